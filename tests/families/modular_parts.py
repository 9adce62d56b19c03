"""Modular pipelines of the tiny components that classic ones are built from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def modular(cls: type, source: Any, without: tuple[str, ...] = (), **more: Any):
    """A modular pipeline of the components that it shares with `source`, a pipeline or components by name.

    It runs `without` these blocks. `more` are further components, and settings of the pipeline, such as `boundary_ratio`; parts of workflows that are
    not used stay empty.
    """
    blocks = cls().blocks
    for name in without:
        blocks.sub_blocks.pop(name)
    pipeline = cls(blocks=blocks)
    components = source if isinstance(source, Mapping) else source.components
    known = set(pipeline.components)
    pipeline.update_components(**{name: part for name, part in components.items() if name in known and part is not None} | more)
    return pipeline
