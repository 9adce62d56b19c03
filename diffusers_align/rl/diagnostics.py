"""What to look at while a policy trains."""

from __future__ import annotations

import torch
from torch import Tensor

from .importance import ClipRange, clip_bounds


def approximate_kl(log_ratio: Tensor, estimator: str = "k3") -> Tensor:
    r"""Estimates $\mathrm{KL}(p_{old} \| p)$ from samples of the old policy, scalar (http://joschu.net/blog/kl-approx.html).

    Args:
        log_ratio: (B,) log p - log p_old at the samples.
        estimator: "k1", -log rho: unbiased, of either sign; "k2", (log rho)^2 / 2: biased, of less variance; "k3",
            rho - 1 - log rho: unbiased and never negative.

    Raises:
        ValueError: another estimator.
    """
    if estimator not in ("k1", "k2", "k3"):
        raise ValueError(f"Unknown estimator {estimator!r}; choose k1, k2 or k3.")
    samples = {"k1": -log_ratio, "k2": 0.5 * log_ratio.square(), "k3": log_ratio.exp() - 1 - log_ratio}
    return samples[estimator].mean()


def clip_fractions(ratio: Tensor, clip_range: ClipRange) -> tuple[Tensor, Tensor]:
    """Shares of the ratios (B,) below and above the interval that the clip leaves them."""
    low, high = clip_bounds(clip_range)
    return (ratio < low).double().mean(), (ratio > high).double().mean()


def effective_sample_size(log_weights: Tensor) -> Tensor:
    r"""$(\sum w)^2 / \sum w^2$ along the last dimension, (..., N) -> (...): N equal weights are N samples, one that outweighs all
    others is 1. Exact for log-weights of any size, and whatever their common offset."""
    return torch.exp(2 * log_weights.logsumexp(-1) - (2 * log_weights).logsumexp(-1))


@torch.no_grad()
def ratio_diagnostics(log_prob: Tensor, old_log_prob: Tensor, clip_range: ClipRange, per_dim: int = 1) -> dict[str, float]:
    """Of one minibatch (B,): `ratio_error` = max |ratio - 1|, which must be 0 (to rounding) before the first update of an epoch;
    `clip_fraction` outside the clip range, of it `clip_low` below and `clip_high` above; `approx_kl`, k3, per `per_dim`
    dimensions."""
    log_ratio = (log_prob - old_log_prob).double() / per_dim
    ratio = log_ratio.exp()
    low, high = clip_fractions(ratio, clip_range)
    return {
        "ratio_error": float((ratio - 1).abs().max()),
        "clip_fraction": float(low + high),
        "clip_low": float(low),
        "clip_high": float(high),
        "approx_kl": float(approximate_kl(log_ratio)),
    }
