"""Modular pipelines with the tiny components of classic ones, so that both kinds can be compared."""

from __future__ import annotations

from typing import Any

import diffusers
from tiny_pipelines import FAMILIES

# The call of a modular pipeline in the place of a classic one's: what the blocks do not take is left out, and those of a guider are its own.
TWINS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd3": ("StableDiffusion3", {"negative_prompt": ""}),
    "sdxl": ("StableDiffusionXL", {}),
    "flux": ("Flux", {}),
    "qwen_image": ("QwenImage", {}),
    "z_image": ("ZImage", {}),
    "wan": ("Wan", {}),
    "ltx": ("LTX", {}),
}


def modular_of(pipeline, family: str):
    """The modular pipeline of the same components."""
    modular = getattr(diffusers, f"{family}ModularPipeline")()
    modular.update_components(**{name: c for name, c in pipeline.components.items() if name in modular.components and c is not None})
    return modular


def build(name: str):
    """A modular pipeline and the arguments of its calls."""
    family, call = TWINS[name]
    pipeline = modular_of(FAMILIES[name].build(), family)
    from diffusers_align.driving.calls import calls_of

    accepted = calls_of(pipeline).parameters
    return pipeline, {argument: value for argument, value in {**FAMILIES[name].call, **call}.items() if argument in accepted}
