r"""Importance ratios between the policy that is trained and the one that sampled, and their clipping.

A log-probability is a sum over D latent dimensions. The field's papers take its mean, which is why their clip ranges are near
1e-4: the functions take `per_dim`, the number D to divide by (1 for the true ratio), and `true_ratio_bound` says what a clip
range means for the true one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def importance_ratio(log_prob: Tensor, old_log_prob: Tensor, per_dim: int = 1) -> Tensor:
    r"""$\exp((\log p - \log p_{old}) / D)$, (B,). `log_prob` are sums over dimensions, in nats."""
    return torch.exp((log_prob - old_log_prob) / per_dim)


def true_ratio_bound(clip_range: float, dimensions: int) -> float:
    """The factor by which a per-dimension clip range lets the true ratio of one step grow: (1 + clip)^D."""
    return math.exp(min(700.0, dimensions * math.log1p(clip_range)))


def describe_clip(clip_range: float, dimensions: int) -> str:
    """What a per-dimension clip range means for the true ratio, with a warning where it hardly lets the policy move."""
    bound = true_ratio_bound(clip_range, dimensions)
    text = f"clip_range {clip_range:g} on the mean over {dimensions} dimensions bounds the true ratio of a step by {bound:.4g}"
    return text + ("; below 1.2, a wider clip range would learn faster" if bound < 1.2 else "")


def clipped_surrogate(ratio: Tensor, advantage: Tensor, clip_range: float | tuple[float, float]) -> Tensor:
    r"""PPO's pessimistic objective as a loss, (B,): $\max(-A\rho, -A\,\mathrm{clip}(\rho, 1 - c_-, 1 + c_+))$.

    `clip_range` is c, or (c_-, c_+) (https://arxiv.org/abs/1707.06347, eq. 7).
    """
    low, high = (clip_range, clip_range) if isinstance(clip_range, (int, float)) else clip_range
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high))
