r"""SVDD: soft value-based decoding (https://arxiv.org/abs/2408.08252, the variant that needs no training, SVDD-PM).

At each step a sample has M candidates for its next state, drawn from the sampler's own kernel. One of them goes on, chosen by the
reward of the clean sample that it predicts, and the others are dropped:

$$ i \sim \mathrm{softmax}_m\big(\hat v_m / \alpha\big), \qquad \hat v_m = r\big(\hat x_0(x^m_{k+1})\big) $$

A small alpha is greedy: 0 takes the best candidate, infinity any of them. There are no weights, so what comes out is not the tilt
$p\,e^{r/\alpha}$, even for many candidates, because the prediction's reward stands for the value. Its authors' examples
(masa-ue/SVDD-image, not compared) draw 20 candidates. The last ones are judged as samples; one of them is chosen in the same way (`returned="sample"`)
or the best is taken. Nothing is chosen at the first, which is noise.

Reported: `rewards` of the last candidates, `chosen` of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .best_of_n import best


def choose(values: Tensor, uniforms: Tensor, *, alpha: float = 0.0) -> Tensor:
    """The candidate that goes on, (P,) indices.

    Args:
        values: (P, M), rewards of the predicted clean samples. NaN is never chosen, unless a group has nothing else.
        uniforms: (P,) in [0, 1).
        alpha: temperature, in units of the reward; 0 takes the best.
    """
    if alpha < 0:
        raise ValueError(f"alpha must not be negative, got {alpha:g}.")
    if alpha == 0:
        return best(values)
    values = values.double()
    logits = torch.where(torch.isfinite(values), values / alpha, -torch.inf)
    logits = torch.where(torch.isfinite(logits).any(1, keepdim=True), logits, 0.0)
    cumulative = logits.softmax(1).cumsum(1)
    positions = uniforms.to(cumulative)[:, None].clamp(max=1 - torch.finfo(torch.float64).eps)
    return torch.searchsorted(cumulative / cumulative[:, -1:], positions, right=True)[:, 0].clamp(max=values.shape[1] - 1)
