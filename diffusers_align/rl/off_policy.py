r"""What a policy is worth, from episodes of another one: importance sampling.

An episode of the behaviour b tells of the target $\pi$ with the weight $\rho = \prod_t \pi(A_t \mid S_t) / b(A_t \mid S_t)$. Equation numbers are those of
Sutton and Barto, 2nd edition. Ratios are those of the steps, (N, T), as `importance.importance_ratio` has them of log-probabilities;
rewards (N, T) are those that follow the actions. Each function estimates the value of the episodes' common first state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .returns import discounts


def ordinary_estimate(ratios: Tensor, rewards: Tensor, *, discount: float = 1.0) -> Tensor:
    r"""$\frac1N \sum_i \rho_i G_i$, a scalar (eq. 5.5): unbiased, and of a variance that may be infinite."""
    return (ratios.prod(1) * _returns(rewards, discount)).mean()


def weighted_estimate(ratios: Tensor, rewards: Tensor, *, discount: float = 1.0) -> Tensor:
    r"""$\sum_i \rho_i G_i / \sum_i \rho_i$, a scalar (eq. 5.6): biased by O(1/N), towards the behaviour's own value, and bounded by the largest return. 0
    where no episode has a weight."""
    weights = ratios.prod(1)
    total = weights.sum()
    return torch.where(total > 0, (weights * _returns(rewards, discount)).sum() / total.where(total > 0, 1.0), 0.0)


def per_decision_estimate(ratios: Tensor, rewards: Tensor, *, discount: float = 1.0) -> Tensor:
    r"""$\frac1N \sum_i \sum_t \gamma^t \rho_{i, 0:t} R_{i, t+1}$, a scalar (section 5.9): unbiased, for what comes after a reward has no say in its weight."""
    return (ratios.cumprod(1) * rewards * discounts(rewards, discount)).sum(1).mean()


def _returns(rewards: Tensor, discount: float) -> Tensor:
    return (rewards * discounts(rewards, discount)).sum(1)
