"""Chroma: Flux without pooled embeddings, with true guidance."""

from __future__ import annotations

import diffusers

from ..case import Case
from ..parts import LATENT_CHANNELS, SHORT, SMALL, TEXT_WIDTH, image_vae, masks, pictures, quiet, seeded, shifted_flow, t5_parts


def chroma(cls: type = diffusers.ChromaPipeline):
    transformer = seeded(
        diffusers.ChromaTransformer2DModel, in_channels=4 * LATENT_CHANNELS, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=TEXT_WIDTH, axes_dims_rope=(4, 4, 8), approximator_hidden_dim=32, approximator_layers=1,
        approximator_num_channels=16,
    )  # fmt: skip
    vae = image_vae(scaling_factor=0.3611, shift_factor=0.1159)
    return quiet(cls(transformer=transformer, vae=vae, scheduler=shifted_flow(use_dynamic_shifting=True), **t5_parts()))


def _inpaint():
    pipeline = chroma(diffusers.ChromaInpaintPipeline)
    pipeline.transformer.register_to_config(guidance_embeds=False)
    return pipeline


CALL = {**SMALL, **SHORT, "negative_prompt": "blurry"}
PART = {"strength": 0.8, "num_inference_steps": 5}

CASES: dict[str, list[Case]] = {
    "ChromaPipeline": [Case(chroma, CALL)],
    "ChromaImg2ImgPipeline": [Case(lambda: chroma(diffusers.ChromaImg2ImgPipeline), {**CALL, **PART}, {"image": pictures()})],
    "ChromaInpaintPipeline": [
        Case(
            _inpaint,
            {**CALL, **PART, "true_cfg_scale": 3.0},
            {"image": pictures(), "mask_image": masks()},
            remark="It reads guidance_embeds of a configuration that has none in diffusers 0.42.1; it is set here.",
        )
    ],
}

ABSENT: dict[str, str] = {}
