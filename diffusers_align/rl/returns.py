r"""How much better than expected each step of a trajectory was, and what is to be expected: temporal differences, advantages, returns.

Step k = 0 ... K - 1 takes the action from state k to state k + 1 and earns `rewards[:, k]`; a reward of the final sample alone is
zeros but the last column (`terminal_rewards`). `values` are $V(x_k)$ of the states the actions were taken in, (B, K): the chain
ends after the last action, so the value behind it is 0. With (B, K + 1) its last column is the value there, for chains that are
cut short. gamma is 1 by default: a denoising chain has a fixed length, and what counts is its last sample (DDPO,
https://arxiv.org/abs/2305.13301, section 4).

A reward of NaN could not be scored: advantages are 0 at its step and all before it, returns are NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor


def terminal_rewards(rewards: Tensor, num_steps: int) -> Tensor:
    """Rewards of the final samples (B,) as rewards of each step, (B, K): zeros but the last."""
    steps = rewards.new_zeros(len(rewards), num_steps)
    steps[:, -1] = rewards
    return steps


def td_errors(rewards: Tensor, values: Tensor, *, gamma: float = 1.0) -> Tensor:
    r"""$\delta_k = r_k + \gamma V(x_{k+1}) - V(x_k)$, (B, K).

    Raises:
        ValueError: `values` are neither (B, K) nor (B, K + 1).
    """
    values = _with_end(rewards, values)
    return rewards + gamma * values[:, 1:] - values[:, :-1]


def gae(rewards: Tensor, values: Tensor, *, gamma: float = 1.0, lam: float = 0.95) -> Tensor:
    r"""Generalised advantage estimates (https://arxiv.org/abs/1506.02438, eq. 16), (B, K):
    $A_k = \sum_i (\gamma\lambda)^i \delta_{k+i}$.

    Args:
        rewards, values: (B, K) and (B, K) or (B, K + 1), see above; without gradient.
        lam: 1 is the Monte Carlo return minus the value (no bias), 0 the TD error (least variance). PPO's 0.95
            (https://arxiv.org/abs/1707.06347, table 3).

    Raises:
        ValueError: `values` are neither (B, K) nor (B, K + 1).
    """
    return _discounted_sums(td_errors(rewards, values, gamma=gamma), gamma * lam).nan_to_num(0.0)


def lambda_returns(rewards: Tensor, values: Tensor, *, gamma: float = 1.0, lam: float = 0.95) -> Tensor:
    r"""What TD($\lambda$) moves V towards, (B, K): $G_k^\lambda = V(x_k) + \sum_i (\gamma\lambda)^i \delta_{k+i}$, which is the mean of all n-step returns with
    weights $(1 - \lambda)\lambda^{n-1}$ (Sutton and Barto, 2nd edition, eq. 12.3). NaN at a reward of NaN and all before it.

    Args:
        rewards, values: as for `gae`; `gae` is this minus V.
        lam: 1 is the return, which is unbiased; 0 the one-step target.

    Raises:
        ValueError: `values` are neither (B, K) nor (B, K + 1).
    """
    return _with_end(rewards, values)[:, :-1] + _discounted_sums(td_errors(rewards, values, gamma=gamma), gamma * lam)


def n_step_returns(rewards: Tensor, values: Tensor, *, n: int, gamma: float = 1.0) -> Tensor:
    r"""$G_{k:k+n} = r_k + \dots + \gamma^{n-1} r_{k+n-1} + \gamma^n V(x_{k+n})$, (B, K) (Sutton and Barto, 2nd edition, eq. 7.1); those that reach
    beyond the end stop there.

    Args:
        rewards, values: as for `gae`.

    Raises:
        ValueError: n is below 1, or `values` are neither (B, K) nor (B, K + 1).
    """
    if n < 1:
        raise ValueError(f"An n-step return has 1 step or more, got n = {n}.")
    values = _with_end(rewards, values)
    targets, end = values, values[:, -1:]  # of no step, of each state
    for _ in range(n):
        targets = torch.cat([rewards + gamma * targets[:, 1:], end], 1)
    return targets[:, :-1]


def discounts(rewards: Tensor, gamma: float) -> Tensor:
    r"""$\gamma^k$, (K,), for rewards (..., K)."""
    return gamma ** torch.arange(rewards.shape[-1]).to(rewards)


def _discounted_sums(x: Tensor, discount: float) -> Tensor:
    """s_k = x_k + discount s_{k+1}, (B, K)."""
    sums = torch.empty_like(x)
    later = torch.zeros_like(x[:, 0])
    for k in reversed(range(x.shape[1])):
        later = x[:, k] + discount * later
        sums[:, k] = later
    return sums


def _with_end(rewards: Tensor, values: Tensor) -> Tensor:
    """(B, K + 1)."""
    batch, steps = rewards.shape
    if values.shape == (batch, steps):
        return torch.cat([values, values.new_zeros(batch, 1)], 1)
    if values.shape != (batch, steps + 1):
        raise ValueError(
            f"Rewards of shape {tuple(rewards.shape)} need values ({batch}, {steps}), one for each step's state, or "
            f"({batch}, {steps + 1}) with the last state's; got {tuple(values.shape)}."
        )
    return values
