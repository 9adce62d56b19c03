"""The statistics of a comparison: means with standard errors, win rates with intervals, diversity. Tensors in, numbers out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Z_95 = 1.959964


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean and standard error of the values (N,) that are not NaN; NaN where there are too few."""
    valid = values[~values.isnan()]
    error = float(valid.std() / len(valid) ** 0.5) if len(valid) > 1 else math.nan
    return float(valid.mean()) if len(valid) else math.nan, error


def in_words(values: Tensor, form: str = ".4f") -> str:
    """`mean ± error` of scores (N,), and how many there are none of (NaN), which neither counts; the mean alone where one sample has no error."""
    mean, error = mean_and_error(values)
    if math.isnan(mean):
        return "without a score"
    missing = int(values.isnan().sum())
    left_out = f" ({missing} of {len(values)} without a score)" if missing else ""
    return (f"{mean:{form}}" if math.isnan(error) else f"{mean:{form}} ± {error:.4f}") + left_out


def wilson_interval(successes: float, number: int) -> tuple[float, float]:
    r"""Wilson's 95 % interval of a proportion: with $\hat p = s / n$ and $z = 1.96$,

    $$ \frac{\hat p + z^2 / 2n \pm z \sqrt{\hat p (1 - \hat p) / n + z^2 / 4n^2}}{1 + z^2 / n} $$

    Unlike the textbook's $\hat p \pm z\,\mathrm{s.e.}$ it stays within [0, 1] and has a width at 0 and 1. Source: E. B. Wilson,
    Probable inference, the law of succession, and statistical inference, JASA 22 (1927).
    """
    if number == 0:
        return math.nan, math.nan
    p, z = successes / number, Z_95
    center = p + z**2 / (2 * number)
    half = z * math.sqrt(p * (1 - p) / number + z**2 / (4 * number**2))
    return max(0.0, (center - half) / (1 + z**2 / number)), min(1.0, (center + half) / (1 + z**2 / number))


@dataclass(frozen=True)
class WinRate:
    """How often one model's reward is the higher one.

    Attributes:
        rate: (wins + ties / 2) / pairs.
        low, high: its 95 % interval.
        left_out: pairs with a NaN, which count nowhere else.
    """

    rate: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int
    left_out: int


def win_rate(values: Tensor, base: Tensor) -> WinRate:
    """Of `values` (N,) over `base` (N,), pair by pair; ties count half."""
    difference = values - base
    wins, ties, losses = int((difference > 0).sum()), int((difference == 0).sum()), int((difference < 0).sum())
    successes, pairs = wins + ties / 2, wins + ties + losses
    rate = successes / pairs if pairs else math.nan
    return WinRate(rate, *wilson_interval(successes, pairs), wins, ties, losses, len(difference) - pairs)


def pairwise_rms(vectors: Tensor) -> Tensor:
    """Root mean square difference of each pair of rows (n, D): (n (n - 1) / 2,)."""
    return torch.pdist(vectors) / vectors.shape[1] ** 0.5


def pairwise_cosine(units: Tensor) -> Tensor:
    """1 - cosine of each pair of unit rows (n, D): (n (n - 1) / 2,)."""
    return torch.pdist(units).square() / 2  # exactly 0 for equal rows, which 1 - a @ b is not


def diversity(vectors: Tensor, groups: list[str], distance: Callable[[Tensor], Tensor]) -> Tensor:
    """Mean distance between the rows of `vectors` (N, D) that share a group, one number per group.

    Raises:
        ValueError: a group has one row only.
    """
    members: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    if lonely := next((group for group, rows in members.items() if len(rows) < 2), None):
        raise ValueError(f"Diversity needs at least two samples of a prompt; there is one of {lonely!r}.")
    return torch.stack([distance(vectors[rows]).mean() for rows in members.values()])
