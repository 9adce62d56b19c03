"""Lumina-Next and Lumina-Image 2."""

from __future__ import annotations

import diffusers
import torch
import transformers

from ..case import Case
from ..parts import LANGUAGE_MODEL, LATENT_CHANNELS, SMALL, TEXT_WIDTH, gemma_parts, gemma_tokenizer, image_vae, quiet, seeded, shifted_flow


def lumina2():
    transformer = seeded(
        diffusers.Lumina2Transformer2DModel, sample_size=8, in_channels=LATENT_CHANNELS, hidden_size=16, num_layers=1, num_refiner_layers=1,
        num_attention_heads=2, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 2, 2), axes_lens=(128, 32, 32), cap_feat_dim=TEXT_WIDTH,
    )  # fmt: skip
    vae = image_vae(levels=4, scaling_factor=0.3611, shift_factor=0.1159)
    return quiet(diffusers.Lumina2Pipeline(transformer=transformer, vae=vae, scheduler=shifted_flow(shift=6.0), **gemma_parts()))


def lumina():
    """Learns a variance beside the velocity, which its pipeline drops. Its padding starts as uninitialised memory, its cross-attention at zero."""
    transformer = seeded(
        diffusers.LuminaNextDiT2DModel, sample_size=8, in_channels=LATENT_CHANNELS, hidden_size=32, num_layers=1, num_attention_heads=2, num_kv_heads=1,
        multiple_of=16, cross_attention_dim=TEXT_WIDTH,
    )  # fmt: skip
    torch.nn.init.normal_(transformer.pad_token)
    torch.nn.init.normal_(transformer.layers[0].gate)
    tokenizer = gemma_tokenizer()
    text_encoder = seeded(transformers.GemmaModel, transformers.GemmaConfig(vocab_size=len(tokenizer), **LANGUAGE_MODEL))
    text = {"tokenizer": tokenizer, "text_encoder": text_encoder}
    return quiet(diffusers.LuminaPipeline(transformer=transformer, vae=image_vae(levels=4, scaling_factor=0.13025), scheduler=shifted_flow(shift=1.0), **text))


LARGER = {**SMALL, "height": 32, "width": 32}

CASES: dict[str, list[Case]] = {
    "LuminaPipeline": [Case(lumina, {**LARGER, "clean_caption": False, "max_sequence_length": 32})],
    "Lumina2Pipeline": [Case(lumina2, {**LARGER, "system_prompt": "Draw.", "max_sequence_length": 48})],
}

ABSENT: dict[str, str] = {}
