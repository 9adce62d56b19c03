r"""How much better than expected each step of a trajectory was: temporal differences and generalised advantages.

Step k = 0 ... K - 1 takes the action from state k to state k + 1 and earns `rewards[:, k]`; a reward of the final sample alone is
zeros but the last column (`terminal_rewards`). `values` are $V(x_k)$ of the states the actions were taken in, (B, K): the chain
ends after the last action, so the value behind it is 0. With (B, K + 1) its last column is the value there, for chains that are
cut short. gamma is 1 by default: a denoising chain has a fixed length, and what counts is its last sample (DDPO,
https://arxiv.org/abs/2305.13301, section 4).

A reward of NaN could not be scored: advantages are 0 at its step and all before it.
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
