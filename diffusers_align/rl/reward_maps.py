"""From a differentiable reward (B,) to a loss (B,): maximise it, up to a margin, or towards a target."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class RewardMap:
    """A map from rewards to losses as a value: (B,) to (B,), NaN stays NaN.

    Attributes:
        form: `none` is -reward; the others are the functions above.
        target: the margin, target or best reward; None for `none`.
        scale: factor of the loss.

    Raises:
        ValueError: an unknown form, or one without the target that it needs.
    """

    form: str = "none"
    target: float | None = None
    scale: float = 1.0

    def __post_init__(self):
        if self.form not in ("none", "hinge", "distance", "shortfall"):
            raise ValueError(f"Unknown reward map {self.form!r}; choose one of none, hinge, distance, shortfall.")
        if (self.target is None) != (self.form == "none"):
            raise ValueError(f"The reward map {self.form!r} {'has no' if self.form == 'none' else 'needs a'} target, got {self.target}.")

    def __call__(self, reward: Tensor) -> Tensor:
        if self.form == "none":
            return -self.scale * reward
        if self.form == "hinge":
            return self.scale * hinge(reward, margin=self.target)
        if self.form == "distance":
            return self.scale * distance(reward, target=self.target)
        return self.scale * shortfall(reward, best=self.target)
