"""From a differentiable reward (B,) to a loss (B,): maximise it, up to a margin, or towards a target."""

from __future__ import annotations

import torch
from torch import Tensor


def hinge(reward: Tensor, *, margin: float) -> Tensor:
    """max(0, margin - reward): nothing is gained beyond the margin, so a reward model is not driven where it knows nothing."""
    return (margin - reward).relu()


def distance(reward: Tensor, *, target: float) -> Tensor:
    """|target - reward|: pulls back what overshoots."""
    return (target - reward).abs()


def shortfall(reward: Tensor, *, best: float = 1.0) -> Tensor:
    """best - reward: the gradient of -reward, on a scale that ends at 0 for a reward whose best value is known."""
    return best - reward


def scored_mean(loss: Tensor) -> Tensor:
    """The mean over the samples that the reward could score (those that are not NaN), 0 with a graph if there are none."""
    scored = ~loss.isnan()
    return torch.where(scored, loss, 0.0).sum() / scored.sum().clamp(min=1)
