"""Ideogram 4: a network for the prompt and one without, thirteen layers of the text encoder for each token."""

from __future__ import annotations

import diffusers
import transformers

from ..case import Case
from ..parts import LATENT_CHANNELS, TEXT_WIDTH, quiet, seeded, shifted_flow
from ..vision_language import qwen3_vl, vision_tokenizer
from .flux2 import flux2_vae

LAYERS_TAKEN, LAST_LAYER = 13, 35


def _transformer():
    return seeded(
        diffusers.Ideogram4Transformer2DModel, in_channels=4 * LATENT_CHANNELS, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        intermediate_size=32, adaln_dim=16, llm_features_dim=LAYERS_TAKEN * TEXT_WIDTH, mrope_section=(4, 2, 2),
    )  # fmt: skip


def _ideogram4():
    text = {"tokenizer": vision_tokenizer(), "text_encoder": qwen3_vl(transformers.Qwen3VLModel, num_hidden_layers=LAST_LAYER + 1)}
    denoisers = {"transformer": _transformer(), "unconditional_transformer": _transformer()}
    return quiet(diffusers.Ideogram4Pipeline(vae=flux2_vae(), scheduler=shifted_flow(shift=1.0), **denoisers, **text))


CALL = {"height": 32, "width": 32, "num_inference_steps": 4, "guidance_scale": 3.0, "guidance_schedule": None, "max_sequence_length": 96}

CASES: dict[str, list[Case]] = {"Ideogram4Pipeline": [Case(_ideogram4, CALL)]}

ABSENT: dict[str, str] = {}
