"""Which of a pipeline's components denoise."""

from __future__ import annotations

from typing import Any

from diffusers import ModelMixin
from torch import nn

from .parts import components_of, parts_apart
from .wrappers import unwrapped


def denoisers(pipeline) -> dict[str, ModelMixin]:
    """The pipeline's denoising networks by component name: its `unet*` or `transformer*` components, in diffusers' naming, or else all models that decode
    nothing and that no part of it (`driving.parts`) has for a scheduler of its own."""
    models = {name: m for name, m in components_of(pipeline).items() if isinstance(m, nn.Module) and name.startswith(("unet", "transformer"))}
    if not models:
        others = {id(component) for part in parts_apart(pipeline) for component in part.components.values()}
        models = {name: m for name, m in pipeline.components.items() if _is_model(m) and not _decodes(m) and id(m) not in others}
    if not models:
        raise ValueError(f"{type(pipeline).__name__} has no denoiser: none of its components {sorted(pipeline.components)} is a diffusers model.")
    return models


def _decodes(model: Any) -> bool:
    """Whether it is a decoder, by its methods: `decode`, `decode_to_image` ..."""
    return any(name == "decode" or name.startswith("decode_") for name in dir(type(unwrapped(model))))


def _is_model(component: Any) -> bool:
    return isinstance(component, nn.Module) and isinstance(unwrapped(component), ModelMixin)
