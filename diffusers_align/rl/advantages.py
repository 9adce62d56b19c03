r"""How much better a sample did than was to be expected: $A = (r - b) / s$, with baselines b and scales s of various scope.

A reward of NaN could not be scored: it enters no statistic and its advantage is 0, so it has no gradient.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor


def _mean_std(rewards: Tensor, ddof: int) -> tuple[Tensor, Tensor]:
    # In float64 the mean of equal float32 numbers is exact; in float32 its rounding error, over eps, would pass for a signal.
    valid = rewards[~rewards.isnan()].double()
    if len(valid) <= ddof:
        return valid.mean() if len(valid) else valid.new_zeros(()), valid.new_zeros(())
    return valid.mean(), valid.std(correction=ddof)


def batch_advantages(rewards: Tensor, *, eps: float = 1e-8, ddof: int = 0) -> Tensor:
    """(r - mean) / (std + eps) over the whole batch, (N,) -> (N,). DDPO without per-prompt statistics."""
    mean, std = _mean_std(rewards, ddof)
    return ((rewards - mean) / (std + eps)).nan_to_num(0.0)


def group_advantages(rewards: Tensor, groups: Tensor, *, global_std: bool = True, eps: float = 1e-4, ddof: int = 0) -> Tensor:
    """(r - mean of the sample's group) / (std + eps). GRPO.

    Args:
        rewards: (N,).
        groups: (N,) integers; samples of one prompt share theirs.
        global_std: divide by the standard deviation of all rewards, the default of Flow-GRPO's official code, which keeps
            groups of nearly equal rewards from blowing up noise; otherwise by the group's own, as in the paper (eq. 2).
        eps: 1e-4 as in the official code: smaller values amplify rounding noise among tied rewards.
        ddof: 0 is numpy's and the official code's; 1 is torch's default (DanceGRPO).

    Returns:
        (N,); 0 for NaN rewards and for groups whose rewards are all equal.
    """
    advantages = torch.zeros_like(rewards)
    scale = _mean_std(rewards, ddof)[1]
    for group in groups.unique():
        members = groups == group
        mean, std = _mean_std(rewards[members], ddof)
        advantages[members] = (rewards[members] - mean) / ((scale if global_std else std) + eps)
    return advantages.nan_to_num(0.0)


class PromptStatistics:
    """Running mean and std of each prompt's rewards (DDPO, https://arxiv.org/abs/2305.13301, section 5.1).

    A prompt seen fewer than `min_count` times borrows the batch's statistics. Unlike in the official code, the state can be
    saved, so that a resumed run goes on exactly.

    Args:
        buffer_size: latest rewards kept for each prompt.
    """

    def __init__(self, buffer_size: int = 32, min_count: int = 16, eps: float = 1e-6):
        self.buffer_size, self.min_count, self.eps = buffer_size, min_count, eps
        self.rewards: dict[str, deque[float]] = {}

    def update(self, prompts: list[str], rewards: Tensor) -> Tensor:
        """Take in the rewards (N,) of `prompts` and return their advantages (N,)."""
        for prompt, reward in zip(prompts, rewards.tolist()):
            if reward == reward:
                self.rewards.setdefault(prompt, deque(maxlen=self.buffer_size)).append(reward)
        batch_mean, batch_std = _mean_std(rewards, 0)
        advantages = torch.zeros_like(rewards)
        for i, prompt in enumerate(prompts):
            mean, std = batch_mean, batch_std
            if len(kept := self.rewards.get(prompt, ())) >= self.min_count:
                mean, std = _mean_std(torch.tensor(list(kept), dtype=rewards.dtype), 0)
            advantages[i] = (rewards[i] - mean) / (std + self.eps)
        return advantages.nan_to_num(0.0)

    def state_dict(self) -> dict[str, list[float]]:
        return {prompt: list(kept) for prompt, kept in self.rewards.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        self.rewards = {prompt: deque(kept, maxlen=self.buffer_size) for prompt, kept in state.items()}
