"""Hunyuan-DiT and HunyuanImage, whose guidance is a component with momentum."""

from __future__ import annotations

import diffusers
import transformers
from diffusers.guiders import AdaptiveProjectedMixGuidance

from ..case import Case
from ..parts import LATENT_CHANNELS, SMALL, TEXT_WIDTH, image_vae, pictures, quiet, seeded, shifted_flow, t5_parts
from ..vision_language import qwen2_5_vl, vision_tokenizer

DIT = {
    "sample_size": 8, "patch_size": 2, "attention_head_dim": 8, "num_attention_heads": 2, "in_channels": LATENT_CHANNELS, "hidden_size": 16,
    "cross_attention_dim": TEXT_WIDTH, "cross_attention_dim_t5": TEXT_WIDTH, "pooled_projection_dim": 16, "activation_fn": "gelu-approximate",
}  # fmt: skip


def _bert_parts() -> dict:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz")]
    tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=77)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=TEXT_WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return {"tokenizer": tokenizer, "text_encoder": seeded(transformers.BertModel, config)}


def _hunyuan_dit(cls: type, **components):
    """Learns its variance beside the noise, which its pipeline drops."""
    scheduler = diffusers.DDPMScheduler(
        beta_start=0.00085, beta_end=0.018, beta_schedule="scaled_linear", prediction_type="v_prediction", steps_offset=1, clip_sample=False
    )  # fmt: skip
    absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    parts = {"transformer": seeded(diffusers.HunyuanDiT2DModel, num_layers=2, **DIT), "vae": image_vae(levels=3, scaling_factor=0.13025)}
    return quiet(cls(scheduler=scheduler, **parts, **_bert_parts(), **t5_parts("_2"), **absent, **components))


def _controlled():
    return _hunyuan_dit(diffusers.HunyuanDiTControlNetPipeline, controlnet=seeded(diffusers.HunyuanDiT2DControlNetModel, transformer_num_layers=2, **DIT))


def _transformer(**config):
    fields = {
        "in_channels": LATENT_CHANNELS, "out_channels": LATENT_CHANNELS, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1,
        "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": TEXT_WIDTH, "rope_axes_dim": (4, 4),
    }  # fmt: skip
    return seeded(diffusers.HunyuanImageTransformer2DModel, **{**fields, **config})


def _vision_parts() -> dict:
    return {"tokenizer": vision_tokenizer(), "text_encoder": qwen2_5_vl()}


def _hunyuan_image(guided: bool = True):
    """The autoencoder's norms have 32 groups."""
    vae = seeded(
        diffusers.AutoencoderKLHunyuanImage, in_channels=3, out_channels=3, latent_channels=LATENT_CHANNELS, block_out_channels=(32, 32, 32),
        layers_per_block=1, scaling_factor=0.75289, spatial_compression_ratio=4, sample_size=32,
    )  # fmt: skip
    tokenizer = transformers.ByT5Tokenizer()
    config = transformers.T5Config(vocab_size=len(tokenizer), d_model=TEXT_WIDTH, d_kv=8, d_ff=32, num_heads=4, num_layers=1, dropout_rate=0.0)
    glyphs = {"tokenizer_2": tokenizer, "text_encoder_2": seeded(transformers.T5EncoderModel, config)}
    guiders = {}
    if guided:
        guiders = {name: AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=2) for name in ("guider", "ocr_guider")}
    transformer = _transformer(text_embed_2_dim=TEXT_WIDTH, guidance_embeds=not guided, use_meanflow=not guided)
    scheduler = shifted_flow(shift=5.0)
    return quiet(diffusers.HunyuanImagePipeline(transformer=transformer, vae=vae, scheduler=scheduler, **_vision_parts(), **glyphs, **guiders))


def _refiner():
    """Pairs of frames are one latent frame of twice the channels; the coarse picture's latents are joined to them."""
    vae = seeded(
        diffusers.AutoencoderKLHunyuanImageRefiner, latent_channels=LATENT_CHANNELS, block_out_channels=(8, 8, 8), layers_per_block=1,
        spatial_compression_ratio=4, temporal_compression_ratio=4,
    )  # fmt: skip
    paired = 2 * LATENT_CHANNELS
    transformer = _transformer(in_channels=2 * paired, out_channels=paired, patch_size=(1, 1, 1), rope_axes_dim=(2, 2, 4), guidance_embeds=True)
    return quiet(diffusers.HunyuanImageRefinerPipeline(transformer=transformer, vae=vae, scheduler=shifted_flow(shift=4.0), guider=None, **_vision_parts()))


CALL = {**SMALL, "use_resolution_binning": False}
UNSCALED = {"height": 16, "width": 16, "num_inference_steps": 4}
NEGATIVE = {"negative_prompt": ["blurry", "gray"]}

CASES: dict[str, list[Case]] = {
    "HunyuanDiTPipeline": [Case(lambda: _hunyuan_dit(diffusers.HunyuanDiTPipeline), CALL)],
    "HunyuanDiTControlNetPipeline": [Case(_controlled, CALL, {"control_image": pictures()})],
    "HunyuanImagePipeline": [
        Case(_hunyuan_image, UNSCALED, NEGATIVE),
        Case(lambda: _hunyuan_image(guided=False), UNSCALED, variant="distilled"),
    ],
    "HunyuanImageRefinerPipeline": [Case(_refiner, UNSCALED, {"image": pictures()})],
}

ABSENT: dict[str, str] = {}
