"""Ovis-Image: Flux's transformer with a language model as text encoder."""

from __future__ import annotations

import diffusers

from ..case import Case
from ..parts import LATENT_CHANNELS, SMALL, TEXT_WIDTH, image_vae, quiet, qwen3, qwen_tokenizer, seeded, shifted_flow


def _ovis_image():
    transformer = seeded(
        diffusers.OvisImageTransformer2DModel, in_channels=4 * LATENT_CHANNELS, out_channels=4 * LATENT_CHANNELS, num_layers=1, num_single_layers=1,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=TEXT_WIDTH, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    vae = image_vae(scaling_factor=0.3611, shift_factor=0.1159)
    scheduler = shifted_flow(use_dynamic_shifting=True)
    parts = {"tokenizer": qwen_tokenizer(), "text_encoder": qwen3()}
    return quiet(diffusers.OvisImagePipeline(transformer=transformer, vae=vae, scheduler=scheduler, **parts))


# The pipeline's own words before the prompt have 160 tokens of one byte.
CALL = {**SMALL, "negative_prompt": "blurry", "max_sequence_length": 256}

CASES: dict[str, list[Case]] = {"OvisImagePipeline": [Case(_ovis_image, CALL)]}

ABSENT: dict[str, str] = {}
