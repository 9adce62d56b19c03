"""Modular pipelines of images: Stable Diffusion 3 and XL, Flux and Flux Kontext, Z-Image."""

from __future__ import annotations

import diffusers

from ..case import Case
from ..modular_parts import modular
from ..parts import SHORT, SMALL, masks, pictures, pil_pictures
from .flux import KEPT_SMALL, flux
from .stable_diffusion_3 import stable_diffusion_3
from .stable_diffusion_xl import stable_diffusion_xl
from .z_image import z_image


def modular_3():
    return modular(diffusers.StableDiffusion3ModularPipeline, stable_diffusion_3())


def modular_xl():
    return modular(diffusers.StableDiffusionXLModularPipeline, stable_diffusion_xl(diffusers.StableDiffusionXLPipeline))


def modular_flux(cls: type = diffusers.FluxModularPipeline):
    return modular(cls, flux())


def modular_z_image():
    return modular(diffusers.ZImageModularPipeline, z_image())


NEGATIVE = {"negative_prompt": ""}
CALL = {**SMALL, **SHORT}
PART = {"strength": 0.8, "num_inference_steps": 5}
SOURCE = {"image": pictures()}

CASES: dict[str, list[Case]] = {
    "StableDiffusion3ModularPipeline": [
        Case(modular_3, {**CALL, **NEGATIVE}),
        Case(modular_3, {**CALL, **NEGATIVE, **PART}, SOURCE, variant="from images"),
    ],
    "StableDiffusionXLModularPipeline": [
        Case(modular_xl, {**SMALL, **NEGATIVE}),
        Case(modular_xl, {**SMALL, **NEGATIVE, **PART}, SOURCE, variant="from images"),
        Case(modular_xl, {**SMALL, **NEGATIVE, **PART}, {**SOURCE, "mask_image": masks()}, variant="blending"),
    ],
    "FluxModularPipeline": [
        Case(modular_flux, CALL),
        Case(modular_flux, {**CALL, **PART}, SOURCE, variant="from images"),
    ],
    "FluxKontextModularPipeline": [
        Case(lambda: modular_flux(diffusers.FluxKontextModularPipeline), {**CALL, **KEPT_SMALL}, {"image": pil_pictures()}, variant="edit"),
        Case(lambda: modular_flux(diffusers.FluxKontextModularPipeline), {**CALL, **KEPT_SMALL}),
    ],
    "ZImageModularPipeline": [
        Case(modular_z_image, {**SMALL, **NEGATIVE, "max_sequence_length": 64}),
        Case(modular_z_image, {**SMALL, **NEGATIVE, **PART, "max_sequence_length": 64}, SOURCE, variant="from images"),
    ],
}

ABSENT: dict[str, str] = {}
