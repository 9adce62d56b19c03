"""How far a model's output is from a target: the matching error of pretraining, and the distance of two models.

Losses on pairs, likes and scores are functions of such errors, one number per sample. So their gradient can be had in two passes:
all errors without a graph, then each micro-batch once more, with `error_coefficients` in the place of the loss.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def matching_error(output: Tensor, target: Tensor) -> Tensor:
    """mean((output - target)^2) over all but the first dimension, (B, *D) -> (B,), in float32 or the wider of the two dtypes."""
    dtype = torch.promote_types(torch.promote_types(output.dtype, target.dtype), torch.float32)
    return (output.to(dtype) - target.to(dtype)).flatten(1).square().mean(1)


def error_coefficients(loss: Callable[..., Tensor], *errors: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    r"""$\partial\,\mathrm{mean}(L) / \partial e_i$ of a loss on errors, for backpropagation in pieces: the gradient of mean(L) is that of
    $\sum_i \mathrm{coefficient}_i\, e_i$ with the coefficients held, micro-batch by micro-batch, winner and loser apart.

    Args:
        loss: `loss(*errors)` is (B,); what it shall not be differentiated by (errors of the reference, labels) it holds itself.
        errors: (B,) each, of the whole batch, with or without a graph.

    Returns:
        The loss (B,) and a coefficient (B,) for each of `errors`, all without a graph.
    """
    leaves = [error.detach().requires_grad_() for error in errors]
    with torch.enable_grad():
        value = loss(*leaves)
        coefficients = torch.autograd.grad(value.mean(), leaves, materialize_grads=True)
    return value.detach(), coefficients


def check_errors(*errors: Tensor) -> None:
    """Refuse errors that were rounded to half precision: a loss looks at their small differences; and those that are not one a sample, (B,).

    Raises:
        TypeError: a tensor in float16 or bfloat16.
        ValueError: one that has more dimensions than samples, or is of others.
    """
    if len(shapes := {tuple(error.shape) for error in errors}) > 1 or errors[0].ndim > 1:
        raise ValueError(f"Errors are one number a sample, (B,), the mean over all else (matching_error): got {', '.join(map(str, sorted(shapes)))}.")
    if any(error.dtype in (torch.float16, torch.bfloat16) for error in errors):
        raise TypeError(
            "Errors in half precision have lost the differences that a preference is learned from: at beta 5000 bfloat16 adds noise of std "
            "5.7 to the logit. Square in float32, as matching_error does; the outputs themselves may be in half precision."
        )
