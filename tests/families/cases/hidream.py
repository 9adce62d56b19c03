"""HiDream-I1: four text encoders, a mixture of experts in the transformer."""

from __future__ import annotations

import diffusers
import transformers

from ..case import Case
from ..parts import (
    CLIP_WIDTH,
    LANGUAGE_MODEL,
    LATENT_CHANNELS,
    SMALL,
    TEXT_WIDTH,
    clip_parts,
    gemma_tokenizer,
    image_vae,
    quiet,
    seeded,
    shifted_flow,
    t5_parts,
)


def _hidream():
    tokenizer = gemma_tokenizer()
    llama = seeded(transformers.LlamaForCausalLM, transformers.LlamaConfig(vocab_size=len(tokenizer), **LANGUAGE_MODEL))
    transformer = seeded(
        diffusers.HiDreamImageTransformer2DModel, patch_size=2, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, num_layers=1, num_single_layers=1,
        attention_head_dim=8, num_attention_heads=4, caption_channels=[TEXT_WIDTH, TEXT_WIDTH], text_emb_dim=2 * CLIP_WIDTH, num_routed_experts=4,
        num_activated_experts=2, axes_dims_rope=(4, 2, 2), max_resolution=(8, 8), llama_layers=[0, 1],
    )  # fmt: skip
    text = {**clip_parts(projected=True), **clip_parts("_2", projected=True), **t5_parts("_3"), "tokenizer_4": tokenizer, "text_encoder_4": llama}
    vae = image_vae(scaling_factor=0.3611, shift_factor=0.1159)
    pipeline = diffusers.HiDreamImagePipeline(transformer=transformer, vae=vae, scheduler=shifted_flow(), **text)
    pipeline.default_sample_size = 8  # whatever the call asks for, pictures have the default's area
    return quiet(pipeline)


CALL = {**SMALL, "negative_prompt": "blurry", "max_sequence_length": 32}

CASES: dict[str, list[Case]] = {"HiDreamImagePipeline": [Case(_hidream, CALL)]}

ABSENT: dict[str, str] = {}
