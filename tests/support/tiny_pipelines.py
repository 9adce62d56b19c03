"""Stock diffusers pipelines with tiny random weights, built in code: no download, no files, under a second each.

`FAMILIES` names them. Models keep the structure of their families (packed latents, several text encoders, a learned variance,
shifted and scaled autoencoders, schedulers as published) at a width of 8 to 32, so that what differs between families is
there to be tested.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers

from tests.families.cases.cogvideo import cogvideox
from tests.families.cases.flux import flux
from tests.families.cases.ltx import ltx
from tests.families.cases.lumina import lumina2
from tests.families.cases.qwen_image import qwen_image
from tests.families.cases.sana import sana
from tests.families.cases.stable_diffusion_3 import stable_diffusion_3
from tests.families.cases.wan import wan
from tests.families.cases.z_image import z_image
from tests.families.parts import (
    CLIP_WIDTH,
    LATENT_CHANNELS,
    SHORT,
    SMALL,
    STABLE_DIFFUSION_BETAS,
    TEXT_WIDTH,
    TRUE_GUIDANCE,
    clip_parts,
    image_vae,
    photograph,
    quiet,
    seeded,
    t5_parts,
    unet,
)


@dataclass(frozen=True)
class Family:
    """How to build a pipeline and call it.

    Attributes:
        build: makes the pipeline, the same weights each time.
        call: arguments of each of its calls.
    """

    build: Callable[[], diffusers.DiffusionPipeline]
    call: dict[str, Any]


# --- noise-predicting families -----------------------------------------------------------------------------------------


def stable_diffusion(cls: type = diffusers.StableDiffusionPipeline, prediction_type: str = "epsilon", in_channels: int = LATENT_CHANNELS):
    scheduler = diffusers.DDIMScheduler(
        **STABLE_DIFFUSION_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type=prediction_type
    )  # fmt: skip
    absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return quiet(cls(unet=unet(in_channels=in_channels), vae=image_vae(), scheduler=scheduler, **clip_parts(), **absent))


def stable_diffusion_xl():
    denoiser = unet(
        cross_attention_dim=2 * CLIP_WIDTH, transformer_layers_per_block=(1, 2), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + CLIP_WIDTH,
    )  # fmt: skip
    scheduler = diffusers.EulerDiscreteScheduler(**STABLE_DIFFUSION_BETAS, timestep_spacing="leading", steps_offset=1)
    vae = image_vae(scaling_factor=0.13025)
    return quiet(diffusers.StableDiffusionXLPipeline(unet=denoiser, vae=vae, scheduler=scheduler, **clip_parts(), **clip_parts("_2", projected=True)))


def pixart_sigma():
    """Learns its variance beside the noise: twice the channels."""
    transformer = seeded(
        diffusers.PixArtTransformer2DModel, sample_size=8, in_channels=LATENT_CHANNELS, out_channels=2 * LATENT_CHANNELS, num_layers=1,
        num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, caption_channels=TEXT_WIDTH, use_additional_conditions=False,
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02)
    return quiet(diffusers.PixArtSigmaPipeline(transformer=transformer, vae=image_vae(), scheduler=scheduler, **t5_parts()))


# --- the table ---------------------------------------------------------------------------------------------------------


LARGER = {**SMALL, "height": 32, "width": 32}

FAMILIES = {
    "sd15": Family(stable_diffusion, SMALL),
    "sd15_v": Family(lambda: stable_diffusion(prediction_type="v_prediction"), SMALL),
    "sd15_img2img": Family(
        lambda: stable_diffusion(diffusers.StableDiffusionImg2ImgPipeline),
        {"image": photograph(), "strength": 0.8, "num_inference_steps": 5, "guidance_scale": 3.0},
    ),
    "sd15_edit": Family(
        lambda: stable_diffusion(diffusers.StableDiffusionInstructPix2PixPipeline, in_channels=2 * LATENT_CHANNELS),
        {"image": photograph(), "num_inference_steps": 4, "guidance_scale": 3.0, "image_guidance_scale": 1.5},
    ),
    "sdxl": Family(stable_diffusion_xl, SMALL),
    "pixart_sigma": Family(pixart_sigma, {**SMALL, **SHORT, "use_resolution_binning": False, "clean_caption": False}),
    "sd3": Family(stable_diffusion_3, {**SMALL, **SHORT}),
    "flux": Family(flux, {**SMALL, **SHORT}),
    "flux_true_cfg": Family(lambda: flux(guidance_embeds=False), {**SMALL, **SHORT, **TRUE_GUIDANCE}),
    "flux_kontext": Family(lambda: flux(diffusers.FluxKontextPipeline), {**SMALL, **SHORT, "image": photograph(), "max_area": 256, "_auto_resize": False}),
    "sana": Family(sana, {**LARGER, **SHORT, "use_resolution_binning": False, "complex_human_instruction": None}),
    "lumina2": Family(lumina2, {**LARGER, "system_prompt": "Draw.", "max_sequence_length": 48}),
    "qwen_image": Family(qwen_image, {**SMALL, **TRUE_GUIDANCE, "guidance_scale": None}),
    "z_image": Family(z_image, {**SMALL, "max_sequence_length": 64}),
    "wan": Family(lambda: quiet(wan()), {**SMALL, **SHORT, "num_frames": 5}),
    "cogvideox": Family(lambda: quiet(cogvideox()), {**SMALL, **SHORT, "num_frames": 5}),
    "ltx": Family(lambda: quiet(ltx()), {**LARGER, **SHORT, "num_frames": 5}),
}  # fmt: skip
