"""PRX: in the latents of an autoencoder, and in pixels."""

from __future__ import annotations

import diffusers
import transformers

from ..case import Case
from ..parts import LANGUAGE_MODEL, LATENT_CHANNELS, SMALL, TEXT_WIDTH, gemma_tokenizer, image_vae, quiet, qwen3, qwen_tokenizer, seeded, shifted_flow

DENOISER = {"patch_size": 2, "context_in_dim": TEXT_WIDTH, "hidden_size": 16, "mlp_ratio": 2.0, "num_heads": 2, "depth": 1, "axes_dim": [4, 4]}


def _prx():
    from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

    tokenizer = gemma_tokenizer()
    tokenizer.model_max_length = 64
    config = transformers.T5GemmaModuleConfig(vocab_size=len(tokenizer), dropout_rate=0.0, layer_types=["full_attention"] * 2, **LANGUAGE_MODEL)
    text = {"tokenizer": tokenizer, "text_encoder": seeded(T5GemmaEncoder, config)}
    transformer = seeded(diffusers.PRXTransformer2DModel, in_channels=LATENT_CHANNELS, **DENOISER)
    vae = image_vae(scaling_factor=0.3611, shift_factor=0.1159)
    return quiet(diffusers.PRXPipeline(transformer=transformer, vae=vae, scheduler=shifted_flow(), **text))


def _pixels():
    """Predicts the picture, of which the pipeline makes a velocity; starts from noise of twice the size."""
    transformer = seeded(diffusers.PRXTransformer2DModel, in_channels=3, bottleneck_size=8, resolution_embeds=True, **DENOISER)
    text = {"tokenizer": qwen_tokenizer(), "text_encoder": qwen3(), "prompt_max_tokens": 32}
    return quiet(diffusers.PRXPixelPipeline(transformer=transformer, scheduler=shifted_flow(), **text))


CALL = {**SMALL, "negative_prompt": "blurry", "use_resolution_binning": False}

ONE = "With guidance the stock call of two samples gives the transformer half as many times as rows."

CASES: dict[str, list[Case]] = {
    "PRXPipeline": [Case(_prx, CALL, one_sample=True, remark=ONE)],
    "PRXPixelPipeline": [Case(_pixels, CALL, one_sample=True, remark=ONE)],
}

ABSENT: dict[str, str] = {}
