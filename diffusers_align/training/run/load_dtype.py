"""In which precision diffusers is asked to load: the keyword has another name in older versions, which read past the new one without a word."""

from __future__ import annotations

import diffusers
import torch


def in_dtype(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The keyword argument of `from_pretrained`, `from_single_file` and `load_components`: `dtype`, and before diffusers 0.40 `torch_dtype`."""
    version = tuple(int(number) for number in diffusers.__version__.split(".")[:2])
    return {"dtype" if version >= (0, 40) else "torch_dtype": dtype}
