"""ERNIE-Image: Flux 2's autoencoder, a Mistral as text encoder; the model that rewrites prompts is left out."""

from __future__ import annotations

import diffusers
import transformers

from ..case import Case
from ..parts import LATENT_CHANNELS, TEXT_WIDTH, quiet, seeded, shifted_flow
from .flux2 import flux2_vae, mistral_parts


def _ernie_image():
    transformer = seeded(
        diffusers.ErnieImageTransformer2DModel, hidden_size=32, num_attention_heads=2, num_layers=1, ffn_hidden_size=32, in_channels=4 * LATENT_CHANNELS,
        out_channels=4 * LATENT_CHANNELS, patch_size=1, text_in_dim=TEXT_WIDTH, rope_axes_dim=(8, 4, 4),
    )  # fmt: skip
    return quiet(diffusers.ErnieImagePipeline(transformer=transformer, vae=flux2_vae(), scheduler=shifted_flow(), **mistral_parts(transformers.Mistral3Model)))


CALL = {"height": 32, "width": 32, "num_inference_steps": 4, "guidance_scale": 3.0, "negative_prompt": "blurry"}

CASES: dict[str, list[Case]] = {"ErnieImagePipeline": [Case(_ernie_image, CALL)]}

ABSENT: dict[str, str] = {}
