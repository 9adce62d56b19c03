"""From the model flags to the pipeline, its scheduler and the arguments of its calls."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModularPipeline

from ... import embedded
from ...checks.given_names import did_you_mean, fetched, is_repository, nearest_path
from ...driving.calls import calls_of
from ...driving.replacements import reads_levels_by_number
from ...schedulers import sde_twin
from ...schedulers.twin import SDE_FIELDS, own_noise_twin
from .decoding import PARTS, decode_in_parts
from .load_dtype import in_dtype
from .modular_loading import INDEX as MODULAR_INDEX
from .modular_loading import is_modular, load_modular
from .quantized_base import quantization
from .single_file import SUFFIXES, is_single_file, load_single_file

logger = logging.getLogger(__name__)

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
INDEX = "model_index.json"
PIPELINES = tuple(name for name in embedded.NAMES if (Path(embedded.path(name)) / INDEX).is_file())
# Where a field of the one kind of scheduler is asked of a model of the other.
_DIFFUSION = "a diffusion model, whose noise is --eta: give that to train_flow_grpo.py, or use train_ddpo.py, train_dpok.py or train_spo.py"
ELSEWHERE = {
    "DDIMSDEScheduler": _DIFFUSION,
    "SigmaSDEScheduler": _DIFFUSION,
    "FlowMatchSDEScheduler": (
        "a flow-matching model, whose noise is --sde_type and --noise_level: leave out --eta, or use train_flow_grpo.py, train_nft.py or train_awm.py"
    ),
}


def load_pipeline(args) -> DiffusionPipeline | ModularPipeline:
    """The pipeline of the model flags: embedded, in a folder, in a single file, or on the Hub. It is modular where there is no classic one. With
    `--vae_slicing` and `--vae_tiling` its autoencoder decodes in parts.

    Raises:
        FileNotFoundError: there is none of that name; the message says where it was looked for.
        ValueError: what is there is no pipeline, or its autoencoder cannot decode in such parts.
    """
    pipeline = _loaded(args)
    decode_in_parts(pipeline, *(flag for flag in PARTS if getattr(args, flag, False)))
    return pipeline


def _loaded(args) -> DiffusionPipeline | ModularPipeline:
    name, dtype = args.pretrained_model_name_or_path, DTYPES[args.mixed_precision]
    if is_single_file(name):
        return load_single_file(name, getattr(args, "single_file_config", None), dtype)
    source = model_source(name)
    with fetched(name):
        if is_modular(source, args.revision):
            if getattr(args, "base_quantization", "none") != "none":
                raise ValueError(f"--base_quantization is for classic pipelines, and {name} is modular, whose components load one by one: leave it out.")
            return load_modular(source, dtype, args.revision, args.variant)
        return DiffusionPipeline.from_pretrained(source, **in_dtype(dtype), revision=args.revision, variant=args.variant, **quantization(args, source, dtype))


def model_source(name: str, needs: str = INDEX) -> str:
    """What `from_pretrained` gets: the folder of an embedded model, a local folder, or a repository of the Hub.

    Args:
        needs: a file or folder without which it is not what is asked for.

    Raises:
        FileNotFoundError: it can be none of these.
        ValueError: the folder lacks what it needs.
    """
    if name in embedded.NAMES and not Path(name).exists():
        if needs == INDEX and name not in PIPELINES:
            raise ValueError(f"The embedded {name} is no pipeline to sample from; {' and '.join(PIPELINES)} are.")
        return embedded.path(name)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / needs).exists() and not (needs == INDEX and (path / MODULAR_INDEX).exists()):
            inside = sorted(entry.name for entry in path.iterdir())
            hint = next((f" To load a single file, name it: {path / entry}." for entry in inside if Path(entry).suffix in SUFFIXES), "")
            raise ValueError(f"The folder {name} holds no {needs}, so it is no pipeline of diffusers; it has {', '.join(inside[:8]) or 'nothing'}.{hint}")
        return str(path)
    if path.is_file():
        raise ValueError(f"{name} is a file, but neither a diffusers pipeline nor a checkpoint ({', '.join(SUFFIXES)}).")
    if not is_repository(name):
        raise FileNotFoundError(
            f"No model {name!r}: it is no embedded model ({', '.join(PIPELINES)}), no folder or file here, and has not the form owner/name of a Hub "
            f"repository.{did_you_mean(name, PIPELINES) or nearest_path(path)}"
        )
    return name


def training_scheduler(pipeline, **sde_fields: Any):
    """The SDE twin of the pipeline's scheduler. What a sampler with noise of its own has no field for is left out, with a warning: scripts have
    defaults for them.

    Raises:
        ValueError: it has none, or not one with these fields; then the message names scripts for such models.
    """
    calls = calls_of(pipeline)
    stock = calls.main_scheduler
    if (own := own_noise_twin(stock)) is not None and (unused := sorted(set(sde_fields) - set(SDE_FIELDS[own.__name__]))):
        logger.warning("%s has noise of its own, so %s has no effect.", type(stock).__name__, ", ".join(f"--{name}" for name in unused))
        sde_fields = {name: value for name, value in sde_fields.items() if name not in unused}
    try:
        return sde_twin(stock, by_sigmas=reads_levels_by_number(calls.functions), **sde_fields)
    except ValueError as error:
        name = str(error).split(" ", 1)[0]
        if name not in ELSEWHERE:
            raise
        raise ValueError(f"This script's noise is not of this model's kind. {type(pipeline).__name__} here is {ELSEWHERE[name]}. ({error})") from error


def call_arguments(args, pipeline) -> dict[str, Any]:
    """What every call of the pipeline gets, from the flags that are given. What its call does not take is left out, with a warning: scripts have
    defaults for it."""
    given = {name: getattr(args, name) for name in ("num_inference_steps", "guidance_scale", "height", "width")}
    given, accepted = {name: value for name, value in given.items() if value is not None}, calls_of(pipeline).parameters
    # Pipelines without a size of their own take that of their pictures, which are resized to it.
    sized = ("height", "width") if getattr(args, "input_columns", None) else ()
    evaluated = [name for name in ("eval_num_inference_steps", "eval_guidance_scale") if getattr(args, name, None) is not None]
    without = [f"--{name}" for name in given if name not in accepted and name not in sized]
    if without := [*without, *(f"--{name}" for name in evaluated if name.removeprefix("eval_") not in accepted)]:
        logger.warning("The call of %s takes no such argument, so %s has no effect.", type(pipeline).__name__, ", ".join(without))
    return {name: value for name, value in given.items() if name in accepted} | args.call_kwargs
