"""Bria 3.2, Fibo and Fibo 2."""

from __future__ import annotations

import diffusers
import transformers

from ..case import Case
from ..parts import (
    LANGUAGE_MODEL,
    LATENT_CHANNELS,
    SHORT,
    SMALL,
    TEXT_WIDTH,
    causal_vae,
    gemma_tokenizer,
    image_vae,
    pil_pictures,
    quiet,
    seeded,
    shifted_flow,
    t5_parts,
)  # fmt: skip
from ..vision_language import qwen3_vl, vision_processor
from .flux2 import flux2_vae

START_TOKEN = 128000
DENOISER = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": [0, 8, 8]}


def _bria():
    transformer = seeded(diffusers.BriaTransformer2DModel, in_channels=4 * LATENT_CHANNELS, joint_attention_dim=TEXT_WIDTH, **DENOISER)
    vae = image_vae(scaling_factor=0.13025, shift_factor=0.0)
    return quiet(diffusers.BriaPipeline(transformer=transformer, vae=vae, scheduler=shifted_flow(), **t5_parts()))


def _fibo(cls: type):
    """An empty prompt is the start token of Llama's vocabulary alone. The transformer takes two layers of the text encoder as one."""
    transformer = seeded(
        diffusers.BriaFiboTransformer2DModel, in_channels=LATENT_CHANNELS, joint_attention_dim=2 * TEXT_WIDTH, text_encoder_dim=TEXT_WIDTH, **DENOISER
    )  # fmt: skip
    vae = causal_vae(diffusers.AutoencoderKLWan, scale_factor_spatial=4)
    config = transformers.SmolLM3Config(**{**LANGUAGE_MODEL, "vocab_size": START_TOKEN + 1, "pad_token_id": 0})
    text_encoder = seeded(transformers.SmolLM3ForCausalLM, config)
    return quiet(cls(transformer=transformer, vae=vae, scheduler=shifted_flow(), tokenizer=gemma_tokenizer(), text_encoder=text_encoder))


def _fibo2():
    """Takes three layers of the text encoder as one, down to the thirty-fifth."""
    transformer = seeded(
        diffusers.BriaFibo2Transformer2DModel, in_channels=LATENT_CHANNELS, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, cap_feat_dim=3 * TEXT_WIDTH,
        injection_layer_ids=(0, 1), perceiver_num_layers=1, min_num_gist_tokens=4, max_num_gist_tokens=8, gist_step=4, gist_min_text_len=8,
        gist_max_text_len=64, axes_dims=(8, 4, 4), axes_lens=(256, 32, 32),
    )  # fmt: skip
    text = {"text_encoder": qwen3_vl(num_hidden_layers=35), "processor": vision_processor(transformers.Qwen3VLProcessor)}
    return quiet(diffusers.BriaFibo2Pipeline(transformer=transformer, vae=flux2_vae(), scheduler=shifted_flow(use_dynamic_shifting=True), **text))


CALL = {**SMALL, **SHORT, "negative_prompt": "blurry"}
LARGER = {"height": 32, "width": 32, "num_inference_steps": 4, "guidance_scale": 3.0, "negative_prompt": "blurry"}
# The pipeline takes its autoencoder to compress 16 times; this one, 4 times, makes pictures of a quarter of the size asked for.
FIBO = {**CALL, "height": 64, "width": 64, "max_sequence_length": 64}
EDITS = ('{"edit_instruction": "make it red"}', '{"edit_instruction": "paint a large dog"}')

CASES: dict[str, list[Case]] = {
    "BriaPipeline": [Case(_bria, CALL)],
    "BriaFiboPipeline": [Case(lambda: _fibo(diffusers.BriaFiboPipeline), FIBO)],
    "BriaFiboEditPipeline": [Case(lambda: _fibo(diffusers.BriaFiboEditPipeline), {**FIBO, "image": pil_pictures(64)[0], "_auto_resize": False}, prompts=EDITS)],
    "BriaFibo2Pipeline": [
        Case(_fibo2, LARGER),
        Case(_fibo2, {**LARGER, "image": pil_pictures(64)[:1]}, variant="edit"),
    ],
}

ABSENT: dict[str, str] = {}
