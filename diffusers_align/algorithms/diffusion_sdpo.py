r"""Diffusion-SDPO: a safeguard that keeps winners from getting worse (https://arxiv.org/abs/2511.03317).

A pair's margin grows also when the errors of both rise, the loser's faster: the usual way in which preference training ruins
images. The safeguard shrinks the loser's gradient, and nothing else, as far as it points against the winner's. With the errors'
gradients g by the model's output, a step of length h along $-g_w + \lambda g_l$ changes the winner's error by $-h (\|g_w\|^2 - \lambda\, g_w \cdot g_l)$, so

$$ \lambda = \mathrm{clip}\Big(\frac{(1 - \mu) \|g_w\|^2}{g_w \cdot g_l},\ 0,\ 1\Big) \ \text{where}\ g_w \cdot g_l > 0, \ \text{else}\ 1
\qquad\Rightarrow\qquad \|g_w\|^2 - \lambda\, g_w \cdot g_l \ge \mu \|g_w\|^2 $$

To first order, and as if both had the same output. It goes with any loss on errors: pass `scale_gradient(error_l, scale)` for error_l, or multiply
the loser's coefficients of `error_coefficients` by it. mu = 0.9 for SD 1.5 and 0.6 for SDXL with DPO, 0.2 with DSPO.

As in the official code (AIDC-AI/Diffusion-SDPO, 84fb241), which has one lambda for a micro-batch. `per_sample` gives each pair its
own: then micro-batches do not matter, and the guarantee holds pair by pair whatever their weights.

Logged: `safeguard`, mean lambda, 1 where it does nothing; else as for the loss that it guards.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def safeguard_scale(residual_w: Tensor, residual_l: Tensor, *, mu: float, per_sample: bool = False) -> Tensor:
    """lambda, (B,) without gradient; one number repeated unless `per_sample`.

    Args:
        residual_w, residual_l: (B, *D) output minus target, to which the errors' gradients are proportional. Where errors have a
            weight, its product with the residual.
        mu: the share of its own progress that a winner keeps, in [0, 1].
        per_sample: a lambda for each pair.

    Raises:
        ValueError: mu lies outside [0, 1].
    """
    if not 0 <= mu <= 1:
        raise ValueError(f"mu is the share of its progress that the winner keeps, from 0 (its error does not rise) to 1, got {mu}.")
    dtype = torch.promote_types(residual_w.dtype, torch.float32)
    winner, loser = residual_w.flatten(1).to(dtype), residual_l.flatten(1).to(dtype)
    own, shared = winner.square().sum(1), (winner * loser).sum(1)
    if not per_sample:
        own, shared = (total.sum().expand(len(winner)) for total in (own, shared))
    against = shared > 0
    return torch.where(against, ((1 - mu) * own / torch.where(against, shared, 1)).clamp(0, 1), 1)


def scale_gradient(error: Tensor, scale: Tensor) -> Tensor:
    """`error` (B,), whose value is unchanged and whose gradient is multiplied by `scale` (B,)."""
    return error.detach() + scale * (error - error.detach())
