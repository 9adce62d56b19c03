"""GLM-Image: a language model writes tokens of a coarse picture, from which the transformer denoises."""

from __future__ import annotations

import diffusers
import torch

from ..case import Case
from ..parts import LATENT_CHANNELS, SMALL, TEXT_WIDTH, image_vae, quiet, seeded, shifted_flow, t5_parts

CODES = 32


def _glm_image():
    transformer = seeded(
        diffusers.GlmImageTransformer2DModel, patch_size=2, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, num_layers=1, attention_head_dim=16,
        num_attention_heads=2, text_embed_dim=TEXT_WIDTH, time_embed_dim=16, condition_dim=8, prior_vq_quantizer_codebook_size=CODES,
    )  # fmt: skip
    vae = image_vae(latents_mean=[-0.3, -0.1, 0.1, 0.3], latents_std=[0.5, 1.0, 1.5, 2.0])
    absent = {"processor": None, "vision_language_encoder": None}
    return quiet(diffusers.GlmImagePipeline(transformer=transformer, vae=vae, scheduler=shifted_flow(), **t5_parts(), **absent))


TOKENS = torch.randint(CODES, (2, 16), generator=torch.Generator().manual_seed(0))

CASES: dict[str, list[Case]] = {
    "GlmImagePipeline": [
        Case(
            _glm_image,
            {**SMALL, "max_sequence_length": 32},
            {"prior_token_ids": TOKENS},
            prompts=("the word 'cat'", "a sign, 'large red dog'"),
            remark="The language model's tokens are given: the pipeline draws them from one generator for all samples.",
        )
    ],
}

ABSENT: dict[str, str] = {}
