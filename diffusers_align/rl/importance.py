r"""Importance ratios between the policy that is trained and the one that sampled, and their clipping.

A log-probability is a sum over D latent dimensions. The field's papers take its mean, which is why their clip ranges are near
1e-4: the functions take `per_dim`, the number D to divide by (1 for the true ratio), and `true_ratio_bound` says what a clip
range means for the true one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# c for [1 - c, 1 + c], or (c_-, c_+); each a number, or (B,) with one for each sample.
ClipRange = float | Tensor | tuple[float | Tensor, float | Tensor]


def refuse_spread(of_samples: Tensor, **others: Tensor | float) -> None:
    """Refuse numbers that belong to other samples than `of_samples` (B,) or (B, K): of the shape (B, 1) beside (B,) torch would make each with each.

    Raises:
        ValueError: one of `others`, which has more of them or does not fit.
    """
    for name, x in others.items():
        if not isinstance(x, Tensor):
            continue  # a number for all
        if any(size not in (1, own) for size, own in zip(reversed(x.shape), reversed(of_samples.shape))) or x.ndim > of_samples.ndim:
            raise ValueError(f"{name} of shape {tuple(x.shape)} does not go with {tuple(of_samples.shape)}: one number a sample, as many of each.")


def importance_ratio(log_prob: Tensor, old_log_prob: Tensor, per_dim: int = 1) -> Tensor:
    r"""$\exp((\log p - \log p_{old}) / D)$, (B,). `log_prob` are sums over dimensions, in nats.

    Raises:
        ValueError: they are of other samples.
    """
    refuse_spread(log_prob, old_log_prob=old_log_prob)
    return torch.exp((log_prob - old_log_prob) / per_dim)


def true_ratio_bound(clip_range: float, dimensions: int) -> float:
    """The factor by which a per-dimension clip range lets the true ratio of one step grow: (1 + clip)^D."""
    return math.exp(min(700.0, dimensions * math.log1p(clip_range)))


def describe_clip(clip_range: float, dimensions: int) -> str:
    """What a per-dimension clip range means for the true ratio, with a warning where it hardly lets the policy move."""
    bound = true_ratio_bound(clip_range, dimensions)
    text = f"clip_range {clip_range:g} on the mean over {dimensions} dimensions bounds the true ratio of a step by {bound:.4g}"
    return text + ("; below 1.2, a wider clip range would learn faster" if bound < 1.2 else "")


def clip_bounds(clip_range: ClipRange) -> tuple[float | Tensor, float | Tensor]:
    """(1 - c_-, 1 + c_+), the interval that a clip range leaves to the ratio."""
    low, high = clip_range if isinstance(clip_range, (tuple, list)) else (clip_range, clip_range)
    return 1 - low, 1 + high


def clipped_surrogate(ratio: Tensor, advantage: Tensor, clip_range: ClipRange) -> Tensor:
    r"""PPO's pessimistic objective as a loss, (B,): $\max(-A\rho, -A\,\mathrm{clip}(\rho, 1 - c_-, 1 + c_+))$
    (https://arxiv.org/abs/1707.06347, eq. 7). Beyond the clip the gradient is 0 where the step would gain, and stays where it
    would make up for a loss.

    Raises:
        ValueError: they are of other samples.
    """
    return torch.maximum(-advantage * ratio, clamped_surrogate(ratio, advantage, clip_range))


def clamped_surrogate(ratio: Tensor, advantage: Tensor, clip_range: ClipRange) -> Tensor:
    r"""DPOK's loss (https://arxiv.org/abs/2305.16381, its official code at 1d49f2c), (B,): $-A\,\mathrm{clip}(\rho, 1 - c_-, 1 + c_+)$.

    The gradient is 0 beyond the clip on either side: a sample that moved the wrong way is not brought back.

    Raises:
        ValueError: they are of other samples.
    """
    refuse_spread(ratio, advantage=advantage)
    low, high = clip_bounds(clip_range)
    # One bound at a time: torch.clamp takes no number beside a tensor.
    return -advantage * ratio.clamp(min=low).clamp(max=high)
