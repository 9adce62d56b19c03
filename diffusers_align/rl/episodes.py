"""Experience of a finite process: draws from tables, and whole episodes of many learners at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .mdp import FiniteMDP


class Episodes(NamedTuple):
    """B episodes of T steps.

    Attributes:
        states: (B, T + 1), the last one where the episode is left.
        actions: (B, T).
        rewards: (B, T).
    """

    states: Tensor
    actions: Tensor
    rewards: Tensor


def draw(probabilities: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One index (B,) of each row of probabilities (B, N)."""
    # By the inverse of the sums: unlike multinomial it takes rows of any length, and what has no probability is never drawn.
    sums = probabilities.double().cumsum(-1)
    uniforms = torch.rand(len(sums), 1, generator=generator, dtype=torch.float64) * sums[:, -1:]
    return torch.searchsorted(sums, uniforms, right=True)[:, 0].clamp(max=sums.shape[1] - 1)


def take(table: Tensor, *indices: Tensor) -> Tensor:
    """The entries (B,) of each learner's own table (B, ...), one index (B,) for each of its dimensions."""
    return table[(torch.arange(len(table)), *indices)]


def added(table: Tensor, change: Tensor, *indices: Tensor) -> Tensor:
    """A copy of the tables (B, ...) in which each learner's entry at its indices (B,) is larger by its change (B,)."""
    return table.index_put((torch.arange(len(table)), *indices), change, accumulate=True)


def sample_episodes(mdp: FiniteMDP, policy: Tensor, start: Tensor, steps: int, generator: torch.Generator | None = None) -> Episodes:
    """Follow a policy (S, A) from states `start` (B,) for `steps` steps. Rewards are the means of the states and actions."""
    states, actions = [start], []
    for _ in range(steps):
        actions.append(draw(policy[states[-1]], generator))
        states.append(draw(mdp.transition[states[-1], actions[-1]], generator))
    visited, taken = torch.stack(states, 1), torch.stack(actions, 1)
    return Episodes(visited, taken, mdp.reward[visited[:, :-1], taken])
