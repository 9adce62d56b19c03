"""From the model flags to the pipeline and to the arguments of its calls."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline

from .. import embedded
from .inputs import call_parameters

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def load_pipeline(args) -> DiffusionPipeline:
    """The pipeline of the model flags: embedded, in a folder or on the Hub."""
    name = args.pretrained_model_name_or_path
    name = embedded.path(name) if name in embedded.NAMES else name
    return DiffusionPipeline.from_pretrained(name, dtype=DTYPES[args.mixed_precision], revision=args.revision, variant=args.variant)


def call_arguments(args) -> dict[str, Any]:
    """What every call of the pipeline gets, from the flags that are given."""
    given = {name: getattr(args, name) for name in ("num_inference_steps", "guidance_scale", "height", "width")}
    given = {name: value for name, value in given.items() if value is not None}
    if getattr(args, "input_columns", None) and (accepted := call_parameters(args)) is not None:
        # pipelines without a size of their own take that of their pictures, which are resized to it
        given = {name: value for name, value in given.items() if name in accepted or name not in ("height", "width")}
    return given | args.call_kwargs
