"""Flux 1: text, images, masks, control, edits, and VisualCloze, which is built on it."""

from __future__ import annotations

import diffusers
import transformers
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder

from ..case import Case
from ..parts import (
    CLIP_WIDTH,
    LATENT_CHANNELS,
    SHORT,
    SMALL,
    TEXT_WIDTH,
    TRUE_GUIDANCE,
    clip_parts,
    image_vae,
    masks,
    pictures,
    pil_pictures,
    quiet,
    seeded,
    shifted_flow,
    t5_parts,
)

PACKED = 4 * LATENT_CHANNELS
DENOISER = {
    "in_channels": PACKED, "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 4, 8),
    "joint_attention_dim": TEXT_WIDTH, "pooled_projection_dim": CLIP_WIDTH, "guidance_embeds": True,
}  # fmt: skip


def flux(cls: type = diffusers.FluxPipeline, components: dict | None = None, **config):
    """`config` is the denoiser's. Packs 2 x 2 latents into a token."""
    transformer = seeded(diffusers.FluxTransformer2DModel, **{**DENOISER, **config})
    vae = image_vae(scaling_factor=0.3611, shift_factor=0.1159)
    scheduler = shifted_flow(use_dynamic_shifting=True)
    return quiet(cls(transformer=transformer, vae=vae, scheduler=scheduler, **clip_parts(), **t5_parts("_2"), **(components or {})))


def _control(cls: type):
    """The control image is joined to the latents."""
    return flux(cls, in_channels=2 * PACKED, out_channels=PACKED)


def _fill():
    """Masked image and mask, of all pixels of a token, are joined to the latents."""
    factor = 2
    return flux(diffusers.FluxFillPipeline, in_channels=2 * PACKED + (2 * factor) ** 2, out_channels=PACKED)


def _controlnet(cls: type):
    return flux(cls, {"controlnet": seeded(diffusers.FluxControlNetModel, **DENOISER)}, guidance_embeds=True)


def _prior():
    vision = transformers.SiglipVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8)
    processor = transformers.SiglipImageProcessor(size={"height": 16, "width": 16})
    return quiet(
        diffusers.FluxPriorReduxPipeline(
            image_encoder=seeded(transformers.SiglipVisionModel, vision), feature_extractor=processor,
            image_embedder=seeded(ReduxImageEncoder, redux_dim=16, txt_in_features=TEXT_WIDTH), **clip_parts(), **t5_parts("_2"),
        )
    )  # fmt: skip


def _visual_cloze(cls: type):
    """Masked images and their mask, of all pixels of a token, are joined to the latents."""
    return flux(cls, {"resolution": 16}, in_channels=2 * PACKED + 16, out_channels=PACKED)


def _grids() -> list:
    """An example of the task, then a picture and the empty place of its answer."""
    first, second = pil_pictures()
    return [[[first, second], [second, None]], [[second, first], [first, None]]]


CALL = {**SMALL, **SHORT}
SOURCE = {"image": pictures()}
MASKED = {"image": pictures(), "mask_image": masks()}
CONTROL = {"control_image": pictures()}
PART = {"strength": 0.8, "num_inference_steps": 5}
KEPT_SMALL = {"max_area": 256, "_auto_resize": False}
GRID = {"num_inference_steps": 4, "guidance_scale": 3.0, "max_sequence_length": 64}
TASKS = {"task_prompt": ["depth to image", "image to depth"], "content_prompt": ["a cat", "a large red dog"]}

CASES: dict[str, list[Case]] = {
    "FluxPipeline": [Case(flux, CALL), Case(lambda: flux(guidance_embeds=False), {**CALL, **TRUE_GUIDANCE}, variant="true guidance")],
    "FluxImg2ImgPipeline": [Case(lambda: flux(diffusers.FluxImg2ImgPipeline), {**CALL, **PART, **TRUE_GUIDANCE}, SOURCE)],
    "FluxInpaintPipeline": [Case(lambda: flux(diffusers.FluxInpaintPipeline), {**CALL, **PART, **TRUE_GUIDANCE}, MASKED)],
    "FluxFillPipeline": [Case(_fill, CALL, MASKED)],
    "FluxControlPipeline": [Case(lambda: _control(diffusers.FluxControlPipeline), CALL, CONTROL)],
    "FluxControlImg2ImgPipeline": [Case(lambda: _control(diffusers.FluxControlImg2ImgPipeline), {**CALL, **PART}, {**SOURCE, **CONTROL})],
    "FluxControlInpaintPipeline": [Case(lambda: _control(diffusers.FluxControlInpaintPipeline), {**CALL, **PART}, {**MASKED, **CONTROL})],
    "FluxControlNetPipeline": [Case(lambda: _controlnet(diffusers.FluxControlNetPipeline), {**CALL, **TRUE_GUIDANCE}, CONTROL)],
    "FluxControlNetImg2ImgPipeline": [Case(lambda: _controlnet(diffusers.FluxControlNetImg2ImgPipeline), {**CALL, **PART}, {**SOURCE, **CONTROL})],
    "FluxControlNetInpaintPipeline": [Case(lambda: _controlnet(diffusers.FluxControlNetInpaintPipeline), {**CALL, **PART}, {**MASKED, **CONTROL})],
    "FluxKontextPipeline": [Case(lambda: flux(diffusers.FluxKontextPipeline), {**CALL, **TRUE_GUIDANCE, **KEPT_SMALL}, SOURCE)],
    "FluxKontextInpaintPipeline": [Case(lambda: flux(diffusers.FluxKontextInpaintPipeline), {**CALL, **PART, **TRUE_GUIDANCE, **KEPT_SMALL}, MASKED)],
    "FluxPriorReduxPipeline": [Case(_prior, {}, {"image": pil_pictures()}, remark="Encodes images into prompt embeddings; it has no scheduler.")],
    "VisualClozeGenerationPipeline": [Case(lambda: _visual_cloze(diffusers.VisualClozeGenerationPipeline), GRID, {**TASKS, "image": _grids()}, prompts=None)],
    "VisualClozePipeline": [
        Case(
            lambda: _visual_cloze(diffusers.VisualClozePipeline),
            {**GRID, "upsampling_height": 16, "upsampling_width": 16, "upsampling_strength": 0.8},
            {**TASKS, "image": _grids()},
            prompts=None,
        )
    ],
}

ABSENT: dict[str, str] = {}
