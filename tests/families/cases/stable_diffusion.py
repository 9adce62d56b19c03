"""Stable Diffusion 1, 2 and XL, and what is built around them."""

from __future__ import annotations

import diffusers

from ..case import Case
from ..parts import STABLE_DIFFUSION_BETAS, clip_parts, image_vae, photograph, unet

SMALL = {"height": 16, "width": 16, "num_inference_steps": 4, "guidance_scale": 3.0}


def stable_diffusion(cls: type, **components):
    scheduler = diffusers.DDIMScheduler(**STABLE_DIFFUSION_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return cls(**{"unet": unet(), "vae": image_vae(), "scheduler": scheduler, **clip_parts(), **absent, **components})


def _pictures() -> list:
    picture = photograph()
    return [picture, picture.flip(-1)]


CASES: dict[str, list[Case]] = {
    "StableDiffusionPipeline": [Case(lambda: stable_diffusion(diffusers.StableDiffusionPipeline), SMALL)],
    "StableDiffusionImg2ImgPipeline": [
        Case(
            lambda: stable_diffusion(diffusers.StableDiffusionImg2ImgPipeline),
            {"strength": 0.8, "num_inference_steps": 5, "guidance_scale": 3.0},
            {"image": _pictures()},
        )
    ],
}

ABSENT: dict[str, str] = {}
