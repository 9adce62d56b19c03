"""Nucleus-Image: a mixture of experts in the transformer."""

from __future__ import annotations

import diffusers
import transformers

from ..case import Case
from ..parts import LATENT_CHANNELS, SMALL, TEXT_WIDTH, causal_vae, quiet, seeded, shifted_flow
from ..vision_language import qwen3_vl, vision_processor


def _nucleus(**config):
    transformer = seeded(
        diffusers.NucleusMoEImageTransformer2DModel, patch_size=2, in_channels=4 * LATENT_CHANNELS, out_channels=LATENT_CHANNELS, num_layers=2,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=TEXT_WIDTH, axes_dims_rope=(8, 4, 4), mlp_ratio=8.0, **config,
    )  # fmt: skip
    text = {"text_encoder": qwen3_vl(), "processor": vision_processor(transformers.Qwen3VLProcessor)}
    vae = causal_vae(diffusers.AutoencoderKLQwenImage)
    return quiet(diffusers.NucleusMoEImagePipeline(transformer=transformer, vae=vae, scheduler=shifted_flow(), **text))


CALL = {**SMALL, "return_index": -1, "max_sequence_length": 512}
EXPERTS = {"moe_enabled": True, "num_experts": 4, "moe_intermediate_dim": 16, "capacity_factors": [2.0, 2.0], "dense_moe_strategy": "leave_first_block_dense"}

CASES: dict[str, list[Case]] = {"NucleusMoEImagePipeline": [Case(lambda: _nucleus(**EXPERTS), CALL, {"negative_prompt": ["blurry", "gray"]})]}

ABSENT: dict[str, str] = {}
