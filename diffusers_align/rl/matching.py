"""How far a model's output is from a target: the matching error of pretraining, and the distance of two models."""

from __future__ import annotations

import torch
from torch import Tensor


def matching_error(output: Tensor, target: Tensor) -> Tensor:
    """mean((output - target)^2) over all but the first dimension, (B, *D) -> (B,), in float32 or the wider of the two dtypes."""
    dtype = torch.promote_types(torch.promote_types(output.dtype, target.dtype), torch.float32)
    return (output.to(dtype) - target.to(dtype)).flatten(1).square().mean(1)
