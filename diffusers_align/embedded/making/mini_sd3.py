"""mini-sd3: flow matching with a small SD3 transformer."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModelWithProjection, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from ..teaching import LATENT_SIZE, save_pipeline, text_config
from .endless import Training, train_on
from .latents import LatentScenes

BATCH, PADDED = 64, 0.03


def silent_t5(width: int) -> tuple[T5EncoderModel, PreTrainedTokenizerFast]:
    """A T5 that says nothing: its last norm's weight is 0, and its tokenizer reads every text as empty.

    StableDiffusion3Pipeline does not load without a third encoder.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, processors

    encoder = T5EncoderModel(T5Config(vocab_size=3, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=1))
    nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(Regex(r"[\s\S]+"), "")
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return encoder, PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", pad_token="<pad>", model_max_length=512)


def load_or_build(out: Path, tokenizer) -> tuple[SD3Transformer2DModel, list[CLIPTextModelWithProjection]]:
    """Transformer and text encoders: those in the output folder, new ones without."""
    folder = out / "mini-sd3"
    if folder.exists():
        encoders = [CLIPTextModelWithProjection.from_pretrained(folder / name, dtype=torch.float32) for name in ("text_encoder", "text_encoder_2")]
        return SD3Transformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32).train(), encoders
    encoders = [CLIPTextModelWithProjection(text_config(tokenizer, 64, 3)) for _ in range(2)]
    return SD3Transformer2DModel(
        sample_size=LATENT_SIZE, patch_size=2, in_channels=4, out_channels=4, num_layers=6, attention_head_dim=32, num_attention_heads=4,
        joint_attention_dim=128, caption_projection_dim=128, pooled_projection_dim=128, pos_embed_max_size=LATENT_SIZE,
    ), encoders  # fmt: skip


def train_sd3(out: Path, minutes: float, decay: bool = False) -> None:
    """SD3 transformer, velocity loss at logit-normal times (https://arxiv.org/abs/2403.03206), text encoders trained along.

    The third encoder is silent: it appends `max_sequence_length` (256 by default) zero tokens to the text. The model sees none
    in most updates and all in some, and so learns to ignore them: pass `max_sequence_length=1` to save the work.
    """
    data = LatentScenes(out, "mini-sd3")
    tokenizer = data.tokenizer
    transformer, encoders = load_or_build(out, tokenizer)

    def loss_fn() -> Tensor:
        x0, ids = data.batch(BATCH)
        noise, sigma = torch.randn_like(x0), torch.sigmoid(torch.randn(len(x0)))
        padding = 256 if torch.rand(()) < PADDED else 0
        mix = sigma.view(-1, 1, 1, 1)
        encoded = [encoder(ids, output_hidden_states=True) for encoder in encoders]
        tokens = torch.cat([e.hidden_states[-2] for e in encoded], -1)
        tokens = torch.cat([tokens, tokens.new_zeros(len(ids), padding, tokens.shape[-1])], 1)
        pooled = torch.cat([e.text_embeds for e in encoded], -1)
        velocity = transformer((1 - mix) * x0 + mix * noise, tokens, pooled, timestep=1000 * sigma).sample
        return F.mse_loss(velocity, noise - x0)

    def save() -> None:
        vae = AutoencoderKL.from_pretrained(out / "vae")
        t5, t5_tokenizer = silent_t5(128)
        pipeline = StableDiffusion3Pipeline(
            transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0), vae=vae, text_encoder=encoders[0],
            tokenizer=tokenizer, text_encoder_2=encoders[1], tokenizer_2=tokenizer, text_encoder_3=t5, tokenizer_3=t5_tokenizer,
        )  # fmt: skip
        save_pipeline(pipeline, out / "mini-sd3")

    train_on("sd3", Training([transformer, *encoders], rates=(0.01, 5e-4)), loss_fn, save, out, minutes, decay)
