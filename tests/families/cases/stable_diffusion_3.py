"""Stable Diffusion 3: text, images, masks, control."""

from __future__ import annotations

import diffusers

from ..case import Case
from ..parts import CLIP_WIDTH, LATENT_CHANNELS, SHORT, SMALL, TEXT_WIDTH, clip_parts, image_vae, masks, pictures, quiet, seeded, shifted_flow, t5_parts

DENOISER = {
    "sample_size": 8, "in_channels": LATENT_CHANNELS, "out_channels": LATENT_CHANNELS, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8,
    "caption_projection_dim": 16, "joint_attention_dim": TEXT_WIDTH, "pooled_projection_dim": 2 * CLIP_WIDTH, "pos_embed_max_size": 16, "qk_norm": "rms_norm",
}  # fmt: skip


def stable_diffusion_3(cls: type = diffusers.StableDiffusion3Pipeline, channels: int = LATENT_CHANNELS, in_channels: int | None = None, **components):
    """`channels` of the latents; the denoiser's `in_channels` are more where a masked image is joined to them."""
    transformer = seeded(diffusers.SD3Transformer2DModel, **{**DENOISER, "in_channels": in_channels or channels, "out_channels": channels})
    text = {**clip_parts(projected=True), **clip_parts("_2", projected=True), **t5_parts("_3")}
    vae = image_vae(latent_channels=channels, scaling_factor=1.5305, shift_factor=0.0609)
    return quiet(cls(transformer=transformer, vae=vae, scheduler=shifted_flow(), **text, **components))


def _controlled(cls: type, **config):
    return stable_diffusion_3(cls, controlnet=seeded(diffusers.SD3ControlNetModel, **{**DENOISER, "num_layers": 1, **config}))


CALL = {**SMALL, **SHORT}
PART = {"strength": 0.8, "num_inference_steps": 5}
MASKED = {"image": pictures(), "mask_image": masks()}

CASES: dict[str, list[Case]] = {
    "StableDiffusion3Pipeline": [Case(stable_diffusion_3, CALL)],
    "StableDiffusion3Img2ImgPipeline": [Case(lambda: stable_diffusion_3(diffusers.StableDiffusion3Img2ImgPipeline), {**CALL, **PART}, {"image": pictures()})],
    "StableDiffusion3InpaintPipeline": [
        Case(lambda: stable_diffusion_3(diffusers.StableDiffusion3InpaintPipeline, 16), {**CALL, **PART}, MASKED),
        Case(
            lambda: stable_diffusion_3(diffusers.StableDiffusion3InpaintPipeline, 16, 33),
            {**CALL, **PART},
            MASKED,
            variant="masked image as input",
        ),
    ],
    "StableDiffusion3ControlNetPipeline": [Case(lambda: _controlled(diffusers.StableDiffusion3ControlNetPipeline), CALL, {"control_image": pictures()})],
    "StableDiffusion3ControlNetInpaintingPipeline": [
        Case(
            lambda: _controlled(diffusers.StableDiffusion3ControlNetInpaintingPipeline, extra_conditioning_channels=1),
            CALL,
            {"control_image": pictures(), "control_mask": masks()},
        )
    ],
}

ABSENT: dict[str, str] = {}
