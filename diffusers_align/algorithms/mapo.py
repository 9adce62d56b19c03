r"""MaPO: margin-aware preference optimization without a reference (https://arxiv.org/abs/2406.06424).

A reference holds a model back when the preferred images look unlike anything it draws. MaPO has none: it fine-tunes on winners
and widens the margin between the likelihoods of winner and loser, which halves the forward passes. A likelihood stands for the
error L by a bounded, falling score:

$$ L = L_w - \beta \log\sigma\big(T\,[\phi(L_w) - \phi(L_l)]\big), \qquad \phi(L) = \frac{sL}{e^{sL} - 1} $$

with s = 0.5, T = 1000, beta = 0.1. For small errors $\phi(L) \approx 1 - sL/2$, so the margin is that of Diffusion-DPO with beta = Ts = 500 and a
reference without error.

As in the official code (mapo-t2i/mapo, 374b3d3), whose score is 0/0 at L = 0; here it is 1. Errors of v and flow models are in their own
parametrisation.

Logged: `accuracy`, the share of pairs whose winner has the smaller error; `margin`, mean of $T[\phi(L_w) - \phi(L_l)]$; `error_w`, `error_l`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..rl.matching import check_errors


def likelihood_score(error: Tensor, *, snr_value: float = 0.5) -> Tensor:
    r"""$\phi(L) = sL / (e^{sL} - 1)$, (B,), from 1 without an error down to 0; smooth at 0."""
    x = snr_value * error
    near = x.abs() < 0.1
    # Where the quotient is not used it must be finite all the same, or its gradient would be NaN times 0.
    apart = torch.where(near, torch.ones_like(x), x)
    square = x.square()
    series = 1 - x / 2 + square / 12 * (1 - square / 60 * (1 - square / 42 * (1 - square / 40)))
    return torch.where(near, series, -apart * torch.exp(-apart) / torch.expm1(-apart))


def mapo_margin(error_w: Tensor, error_l: Tensor, *, snr_value: float = 0.5, num_timesteps: int = 1000) -> Tensor:
    r"""$T[\phi(L_w) - \phi(L_l)]$, (B,).

    Raises:
        TypeError: errors in half precision.
        ValueError: errors that are not one a sample, of the same samples.
    """
    check_errors(error_w, error_l)
    return num_timesteps * (likelihood_score(error_w, snr_value=snr_value) - likelihood_score(error_l, snr_value=snr_value))


def mapo_loss(error_w: Tensor, error_l: Tensor, *, beta: float = 0.1, snr_value: float = 0.5, num_timesteps: int = 1000) -> Tensor:
    """The loss of each pair, (B,).

    Args:
        error_w, error_l: (B,) mean squared errors of winner and loser at the same noise and timestep.
        beta: weight of the margin, 0.1; the official default, like the next two.
        snr_value: s.
        num_timesteps: T.

    Raises:
        TypeError: errors in half precision.
    """
    return error_w - beta * F.logsigmoid(mapo_margin(error_w, error_l, snr_value=snr_value, num_timesteps=num_timesteps))
