"""Tiny components of diffusers pipelines, built in code: no download, no files. Text encoders and tokenizers, autoencoders, denoisers, schedulers.

Models keep the structure of their families at a width of 8 to 32.
"""

from __future__ import annotations

import string
from typing import Any

import diffusers
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

CLIP_WIDTH, TEXT_WIDTH, LATENT_CHANNELS = 16, 32, 4
STABLE_DIFFUSION_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def seeded(cls: type, *args: Any, **config: Any) -> torch.nn.Module:
    """`cls(*args, **config)` with every matrix drawn anew: some layers start at zero, which would hide what lies before
    them, and some parameters start as uninitialised memory."""
    torch.manual_seed(0)
    module = cls(*args, **config)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            if fan_in > 1:
                parameter.normal_(std=fan_in**-0.5)
    return module.eval()


def clip_tokenizer() -> transformers.CLIPTokenizer:
    """One token a character, in and at the end of a word."""
    characters = [c for c in string.printable if c.isprintable() and c != " "]
    tokens = [*characters, *(f"{c}</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


def t5_tokenizer() -> transformers.T5Tokenizer:
    """One token a character."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -100.0), ("▁", -2.0)]
    vocab = [*special, *((c, -3.0) for c in string.printable if c.isprintable() and c != " ")]
    return transformers.T5Tokenizer(vocab=vocab, eos_token="</s>", unk_token="<unk>", pad_token="<pad>", extra_ids=10, model_max_length=512)


def byte_vocabulary(*special: str) -> dict[str, int]:
    return {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}


def gemma_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a byte after a start token, without which an empty prompt has no token to average."""
    tokenizer = Tokenizer(models.BPE(vocab=byte_vocabulary("<pad>", "<eos>", "<bos>", "<unk>"), merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))])
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="right", model_max_length=512, **names)


def qwen_tokenizer() -> transformers.Qwen2Tokenizer:
    """One token a byte, with a chat template."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = transformers.Qwen2Tokenizer(vocab=byte_vocabulary(), merges=[], additional_special_tokens=special, model_max_length=2048)
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    return tokenizer


def clip(tokenizer: transformers.CLIPTokenizer, projected: bool = False) -> torch.nn.Module:
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=1,
        hidden_size=CLIP_WIDTH, intermediate_size=16, num_attention_heads=2, num_hidden_layers=2, projection_dim=CLIP_WIDTH,
    )  # fmt: skip
    return seeded(transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel, config)


def clip_parts(suffix: str = "", projected: bool = False) -> dict[str, Any]:
    tokenizer = clip_tokenizer()
    return {f"tokenizer{suffix}": tokenizer, f"text_encoder{suffix}": clip(tokenizer, projected)}


def t5_parts(suffix: str = "") -> dict[str, Any]:
    tokenizer = t5_tokenizer()
    config = transformers.T5Config(vocab_size=len(tokenizer), d_model=TEXT_WIDTH, d_kv=8, d_ff=32, num_heads=4, num_layers=1, dropout_rate=0.0)
    return {f"tokenizer{suffix}": tokenizer, f"text_encoder{suffix}": seeded(transformers.T5EncoderModel, config)}


LANGUAGE_MODEL = {
    "hidden_size": TEXT_WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "attention_dropout": 0.0, "bos_token_id": None, "eos_token_id": 0,
}  # fmt: skip


def gemma_parts() -> dict[str, Any]:
    tokenizer = gemma_tokenizer()
    return {"tokenizer": tokenizer, "text_encoder": seeded(transformers.Gemma2Model, transformers.Gemma2Config(vocab_size=len(tokenizer), **LANGUAGE_MODEL))}


def image_vae(levels: int = 2, **config: Any) -> diffusers.AutoencoderKL:
    fields = {
        "block_out_channels": [8] * levels, "norm_num_groups": 2, "latent_channels": LATENT_CHANNELS,
        "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels,
    }  # fmt: skip
    return seeded(diffusers.AutoencoderKL, **{**fields, **config})


def causal_vae(cls: type, **config: Any) -> torch.nn.Module:
    """The video autoencoder of Wan and Qwen-Image: a quarter of the size, a quarter of the frames after the first."""
    statistics = {"latents_mean": [-0.3, -0.1, 0.1, 0.3], "latents_std": [0.5, 1.0, 1.5, 2.0]}
    fields = {"base_dim": 4, "z_dim": LATENT_CHANNELS, "dim_mult": [1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [True, True], **statistics}
    return seeded(cls, **{**fields, **config})


def shifted_flow(**config: Any) -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **config})


def quiet(pipeline: diffusers.DiffusionPipeline) -> diffusers.DiffusionPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def unet(**config: Any) -> diffusers.UNet2DConditionModel:
    fields = {
        "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 2, "attention_head_dim": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": CLIP_WIDTH,
    }  # fmt: skip
    return seeded(diffusers.UNet2DConditionModel, **{**fields, **config})


def photograph(size: int = 16) -> torch.Tensor:
    """(1, 3, size, size), a smooth picture in [0, 1]."""
    ramp = torch.linspace(0, 1, size)
    return torch.stack([ramp[:, None].expand(size, size), ramp[None].expand(size, size), (ramp[:, None] - ramp[None]).abs()])[None]


# --- inputs and parts of flow-matching image families ------------------------------------------------------------------


SMALL = {"height": 16, "width": 16, "num_inference_steps": 4, "guidance_scale": 3.0}
SHORT = {"max_sequence_length": 32}
TRUE_GUIDANCE = {"true_cfg_scale": 3.0, "negative_prompt": "blurry"}


def pictures(size: int = 16) -> list[torch.Tensor]:
    """Two pictures (1, 3, size, size) in [0, 1], one a sample."""
    picture = photograph(size)
    return [picture, picture.flip(-1)]


def masks(size: int = 16) -> list[torch.Tensor]:
    """Two masks (1, 1, size, size), one a sample: 1 is painted anew, in the left and the right half."""
    left = (torch.arange(size) < size // 2).float().expand(1, 1, size, size).contiguous()
    return [left, left.flip(-1)]


def pil_pictures(size: int = 16) -> list[Image.Image]:
    """`pictures` as pipelines take them that hand them to a processor of their own."""
    return [Image.fromarray((picture[0].permute(1, 2, 0) * 255).round().byte().numpy()) for picture in pictures(size)]


def qwen3(cls: type = transformers.Qwen3Model, **config: Any) -> torch.nn.Module:
    return seeded(cls, transformers.Qwen3Config(**{"vocab_size": len(qwen_tokenizer()), **LANGUAGE_MODEL, **config}))


def xl_unet(**config: Any) -> diffusers.UNet2DConditionModel:
    fields = {
        "cross_attention_dim": 2 * CLIP_WIDTH, "transformer_layers_per_block": (1, 2), "use_linear_projection": True, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + CLIP_WIDTH,
    }  # fmt: skip
    return unet(**{**fields, **config})


def first_scheduler(**config: Any) -> diffusers.PNDMScheduler:
    """Stable Diffusion 1's own."""
    return diffusers.PNDMScheduler(**{**STABLE_DIFFUSION_BETAS, "skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1, **config})


def xl_scheduler() -> diffusers.EulerDiscreteScheduler:
    """Stable Diffusion XL's own."""
    return diffusers.EulerDiscreteScheduler(**STABLE_DIFFUSION_BETAS, timestep_spacing="leading", steps_offset=1)


def picture_encoder(width: int = CLIP_WIDTH, projected: bool = True, cls: type | None = None) -> torch.nn.Module:
    """CLIP's encoder of pictures of 16 x 16 pixels in four patches."""
    config = transformers.CLIPVisionConfig(
        hidden_size=width, projection_dim=width, intermediate_size=16, num_attention_heads=2, num_hidden_layers=2, image_size=16, patch_size=8
    )
    return seeded(cls or (transformers.CLIPVisionModelWithProjection if projected else transformers.CLIPVisionModel), config)


def picture_processor() -> transformers.CLIPImageProcessor:
    return transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
