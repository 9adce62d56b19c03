"""A whole pipeline in one `.safetensors` file, as other tools and model sites have them."""

from __future__ import annotations

from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import SingleFileComponentError, fetch_diffusers_config, load_single_file_checkpoint

from ...checks.given_names import hub_reason, is_hub_error
from .load_dtype import in_dtype

SUFFIXES = (".safetensors", ".ckpt")


def is_single_file(name: str) -> bool:
    """Whether a model's name is that of a file here."""
    return Path(name).suffix in SUFFIXES and Path(name).is_file()


def load_single_file(path: str, config: str | None, dtype: torch.dtype) -> DiffusionPipeline:
    """The pipeline of a single-file checkpoint.

    Args:
        config: folder or Hub repository of a pipeline of the same architecture, for the configuration of its parts, its scheduler and its tokenizers;
            weights that lie there are not used. Absent, diffusers guesses the repository by the file's tensors.

    Raises:
        FileNotFoundError: the configuration could not be had.
        ValueError: the file is no checkpoint of a whole pipeline, or no file without code.
    """
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"{path} is a pickle, which may hold code, so it is not opened: convert it to .safetensors.")
    source = config or _guessed(path)
    try:
        index = DiffusionPipeline.load_config(source)
    except Exception as error:
        why = hub_reason(error) if is_hub_error(error) and not Path(source).exists() else str(error).splitlines()[0]
        whose = "--single_file_config" if config else "guessed by its tensors"
        raise FileNotFoundError(
            f"{path} holds weights alone. Their configuration, scheduler and tokenizers are to come from {source!r} ({whose}), which cannot be read: {why}. "
            "Give --single_file_config, a folder or Hub name of a pipeline of the same architecture."
        ) from error
    cls = getattr(diffusers, index.get("_class_name", ""), None)
    if not hasattr(cls, "from_single_file"):
        raise ValueError(f"{source} is of {index.get('_class_name')!r}, which diffusers cannot load from a single file.")
    try:
        return cls.from_single_file(path, config=source, **in_dtype(dtype))
    except (SingleFileComponentError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} could not be loaded as a {cls.__name__} like {source}: {str(error).strip().splitlines()[0]} If it is of another architecture, name a "
            "pipeline of its own with --single_file_config; if it holds one part of a pipeline, put that part into a pipeline's folder instead."
        ) from error


def _guessed(path: str) -> str:
    try:
        return fetch_diffusers_config(load_single_file_checkpoint(path))["pretrained_model_name_or_path"]
    except Exception as error:
        raise ValueError(f"{path} is no readable .safetensors file: {error}") from error
