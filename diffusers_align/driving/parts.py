"""Pipelines that call other pipelines, their parts: for the time of a call, the parts walk the whole one's scheduler and let gradients through.

A part holds the scheduler that the pipeline was built with, and diffusers decorates its `__call__` with `torch.no_grad`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from diffusers import DiffusionPipeline

from .replacements import held

# Of each class of pipelines, by the names in its config: those that are components.
_NAMES: WeakKeyDictionary[type, dict[tuple[str, ...], tuple[str, ...]]] = WeakKeyDictionary()


def components_of(pipeline) -> dict[str, Any]:
    """`pipeline.components`, for which diffusers reads the signature of `__init__` each time, as often as a call is made."""
    cls = type(pipeline)
    if getattr(cls, "components", None) is not DiffusionPipeline.components:
        return pipeline.components
    known, names = _NAMES.setdefault(cls, {}), tuple(pipeline.config)
    if names not in known:
        known[names] = tuple(pipeline.components)
    return {name: getattr(pipeline, name) for name in known[names]}


def parts_of(pipeline) -> list[DiffusionPipeline]:
    """The pipelines that a pipeline has as attributes."""
    return [value for value in vars(pipeline).values() if isinstance(value, DiffusionPipeline)]


def parts_apart(pipeline) -> list[DiffusionPipeline]:
    """Those whose scheduler is another component of the pipeline: what they sample is no part of the main scheduler's chain."""
    parts = parts_of(pipeline)
    others = {id(component) for name, component in components_of(pipeline).items() if name != "scheduler"} if parts else set()
    return [part for part in parts if id(part.components.get("scheduler")) in others]


@contextmanager
def parts_follow(pipeline) -> Iterator[None]:
    """Context: each part has the pipeline's own scheduler, unless it has another of the pipeline's components; its calls run undecorated, in autograd's
    own mode, and show no progress."""
    apart = parts_apart(pipeline)
    with ExitStack() as stack:
        for part in parts_of(pipeline):
            if not any(part is other for other in apart):
                stack.enter_context(held(part, "scheduler", pipeline.scheduler))
            stack.enter_context(held(part, "_progress_bar_config", {**getattr(part, "_progress_bar_config", {}), "disable": True}))
            stack.enter_context(_undecorated(part))
        yield


@contextmanager
def _undecorated(part: DiffusionPipeline) -> Iterator[None]:
    """Context: `part(...)` is the function that diffusers decorates. Python looks calls up on the class, so the part gets a class of its own."""
    cls = type(part)
    part.__class__ = type(cls.__name__, (cls,), {"__call__": inspect.unwrap(cls.__call__), "__module__": cls.__module__})
    try:
        yield
    finally:
        part.__class__ = cls
