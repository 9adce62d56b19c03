"""Modular pipelines by name: a folder or a repository whose index is `modular_model_index.json`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ModularPipeline

from ...driving.calls import calls_of
from .load_dtype import in_dtype

INDEX, CLASSIC_INDEX = ModularPipeline.config_name, DiffusionPipeline.config_name


def is_modular(source: str, revision: str | None = None) -> bool:
    """Whether a folder or a repository holds a modular pipeline and no classic one; of one that cannot be read, False."""
    if (folder := Path(source)).is_dir():
        return (folder / INDEX).is_file() and not (folder / CLASSIC_INDEX).is_file()
    return not _has_index(DiffusionPipeline, source, revision) and _has_index(ModularPipeline, source, revision)


def _has_index(kind: type, source: str, revision: str | None) -> bool:
    try:
        kind.load_config(source, revision=revision)
    except OSError:
        return False
    return True


def load_modular(source: str, dtype: torch.dtype, revision: str | None = None, variant: str | None = None) -> ModularPipeline:
    """The pipeline with all components that its index says where to find.

    Raises:
        ValueError: one of these could not be loaded, or the blocks are code of the repository's own, which nobody has looked at.
    """
    pipeline = _unloaded(source, revision)
    pipeline.load_components(**in_dtype(dtype), **({"variant": variant} if variant else {}))
    named = (name for name in pipeline.pretrained_component_names if pipeline.get_component_spec(name).pretrained_model_name_or_path)
    if missing := sorted(set(named) & set(pipeline.null_component_names)):
        raise ValueError(f"{source}: {', '.join(missing)} could not be loaded, for the reasons in the log above. Its {INDEX} says where they should be.")
    return pipeline


def modular_parameters(source: str, revision: str | None = None) -> Mapping[str, inspect.Parameter]:
    """What the pipeline's call takes, as `inspect.signature` has it; its components are not loaded."""
    return calls_of(_unloaded(source, revision)).parameters


def _unloaded(source: str, revision: str | None) -> ModularPipeline:
    try:
        return ModularPipeline.from_pretrained(source, revision=revision)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"The blocks of {source} are code of its own, which scripts do not run: read it, load it in Python with trust_remote_code=True, and train "
            "Policy(pipe) there; or save a pipeline of diffusers' own blocks with its components."
        ) from error
