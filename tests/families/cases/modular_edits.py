"""Modular pipelines that read pictures by their text encoder: Qwen-Image, its edits and layers, Qwen-Image 2.1, Flux 2."""

from __future__ import annotations

import diffusers

from ..case import Case
from ..modular_parts import modular
from ..parts import SMALL, pictures, pil_pictures
from .flux2 import CALL as FLUX_2
from .flux2 import SHARED, flux2, klein_parts, mistral_parts
from .qwen_image import edit, layered, qwen_image, qwen_image_21


def modular_qwen():
    return modular(diffusers.QwenImageModularPipeline, qwen_image())


def modular_edit(cls: type):
    return modular(cls, edit(diffusers.QwenImageEditPipeline))


def modular_layered():
    return modular(diffusers.QwenImageLayeredModularPipeline, layered())


# classes that are newer than the oldest diffusers are read when a case is built
def modular_21():
    return modular(diffusers.QwenImage21ModularPipeline, qwen_image_21())


def modular_21_turbo():
    return modular(diffusers.QwenImage21TurboModularPipeline, qwen_image_21())


def modular_flux_2():
    return modular(diffusers.Flux2ModularPipeline, flux2(diffusers.Flux2Pipeline, **mistral_parts()))


def modular_klein(cls: type):
    return modular(cls, flux2(diffusers.Flux2KleinPipeline, **klein_parts()))


NEGATIVE = {"negative_prompt": "blurry"}
CALL = {**SMALL, **NEGATIVE, "max_sequence_length": 64}
PART = {"strength": 0.8, "num_inference_steps": 5}
EDIT = {**NEGATIVE, "num_inference_steps": 4, "guidance_scale": 3.0}
NEWER = {**EDIT, "height": 64, "width": 64}
TURBO = {"height": 64, "width": 64, "num_inference_steps": 4}
WITHOUT_CACHE = {"use_kv_cache": False}
PLAIN = {name: value for name, value in FLUX_2.items() if name != "guidance_scale"}

CASES: dict[str, list[Case]] = {
    "QwenImageModularPipeline": [
        Case(modular_qwen, CALL),
        Case(modular_qwen, {**CALL, **PART}, {"image": pictures()}, variant="from images"),
    ],
    "QwenImageEditModularPipeline": [
        Case(lambda: modular_edit(diffusers.QwenImageEditModularPipeline), {**EDIT, "height": 256, "width": 256}, {"image": pil_pictures()})
    ],
    "QwenImageEditPlusModularPipeline": [
        Case(
            lambda: modular_edit(diffusers.QwenImageEditPlusModularPipeline),
            {**EDIT, "height": 256, "width": 256, "image": pil_pictures()},
            one_sample=True,
        )
    ],
    "QwenImageLayeredModularPipeline": [
        Case(modular_layered, {**EDIT, "layers": 2, "resolution": 640, "image": pil_pictures()[0].convert("RGBA")}, one_sample=True)
    ],
    "QwenImage21ModularPipeline": [
        Case(modular_21, NEWER),
        Case(modular_21, {**NEWER, **WITHOUT_CACHE}, variant="without cache"),
        Case(
            modular_21,
            {**NEWER, "image": pil_pictures(64)[:1], "output_resolution": 64},
            variant="edit",
        ),
    ],
    "QwenImage21TurboModularPipeline": [
        Case(modular_21_turbo, TURBO),
        Case(modular_21_turbo, {**TURBO, **WITHOUT_CACHE}, variant="without cache"),
    ],
    "Flux2ModularPipeline": [
        Case(modular_flux_2, {**FLUX_2, "max_sequence_length": 640}),
        Case(modular_flux_2, {**FLUX_2, "max_sequence_length": 640, **SHARED}, variant="edit"),
    ],
    "Flux2KleinModularPipeline": [
        Case(lambda: modular_klein(diffusers.Flux2KleinModularPipeline), PLAIN),
        Case(lambda: modular_klein(diffusers.Flux2KleinModularPipeline), {**PLAIN, **SHARED}, variant="edit"),
    ],
    "Flux2KleinBaseModularPipeline": [
        Case(lambda: modular_klein(diffusers.Flux2KleinBaseModularPipeline), FLUX_2),
        Case(lambda: modular_klein(diffusers.Flux2KleinBaseModularPipeline), {**FLUX_2, **SHARED}, variant="edit"),
    ],
}

ABSENT: dict[str, str] = {}
