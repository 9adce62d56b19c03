"""From the model flags to the pipeline and to the arguments of its calls."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline

from .. import embedded

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def load_pipeline(args) -> DiffusionPipeline:
    """The pipeline of the model flags: embedded, in a folder or on the Hub."""
    name = args.pretrained_model_name_or_path
    name = embedded.path(name) if name in embedded.NAMES else name
    return DiffusionPipeline.from_pretrained(name, dtype=DTYPES[args.mixed_precision], revision=args.revision, variant=args.variant)


def call_arguments(args) -> dict[str, Any]:
    """What every call of the pipeline gets, from the flags that are given."""
    given = {name: getattr(args, name) for name in ("num_inference_steps", "guidance_scale", "height", "width")}
    return {name: value for name, value in given.items() if value is not None} | args.call_kwargs
