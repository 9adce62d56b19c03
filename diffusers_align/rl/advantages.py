r"""How much better a sample did than was to be expected: $A = (r - b) / s$, with baselines b and scales s of various scope.

A reward of NaN could not be scored: it enters no statistic and its advantage is 0, so it has no gradient. Rewards of each step
(N, K), as dense credit has them, are compared with those of the same step alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor


def _mean_std(rewards: Tensor, ddof: int) -> tuple[Tensor, Tensor]:
    """Of each column of (N, ...), in float64, NaN left out; 0 where nothing is left."""
    # In float64 the mean of equal float32 numbers is exact; in float32 its rounding error, over eps, would pass for a signal.
    valid, count = rewards.double().nan_to_num(0.0), (~rewards.isnan()).sum(0)
    mean = valid.sum(0) / count.clamp(min=1)
    squares = torch.where(rewards.isnan(), 0.0, (valid - mean).square()).sum(0)
    return mean, (squares / (count - ddof).clamp(min=1)).sqrt()


ROUNDING = 1e-6  # of a reward's size: differences as small are those of float32, and no preference
SMALL_SPREAD = 0.01  # from here on down, eps is the hundredth part of a reward's spread: 1e-4 would be a weight of its own


def _within_groups(rewards: Tensor, groups: Tensor, of_group: Callable[[Tensor], Tensor]) -> Tensor:
    """`of_group` of each group's rewards, both in float64, in their places; 0 for NaN."""
    rewards = rewards.double()
    out = torch.zeros_like(rewards)
    for group in groups.unique():
        members = groups == group
        out[members] = of_group(rewards[members]).double()
    return out.nan_to_num(0.0)


def batch_advantages(rewards: Tensor, *, eps: float = 1e-8, ddof: int = 0) -> Tensor:
    """(r - mean) / (std + eps) over the whole batch, (N,) or (N, K). DDPO without per-prompt statistics."""
    mean, std = _mean_std(rewards, ddof)
    return ((rewards - mean) / (std + eps)).nan_to_num(0.0).to(rewards.dtype)


def group_advantages(
    rewards: Tensor,
    groups: Tensor,
    *,
    normalise: bool = True,
    global_std: bool = True,
    zero_std: str = "keep",
    eps: float | Tensor = 1e-4,
    ddof: int = 0,
) -> Tensor:
    """(r - mean of the sample's group) / (std + eps). GRPO.

    Args:
        rewards: (N,), or (N, K) with one for each step, compared at that step alone (DenseGRPO,
            https://arxiv.org/abs/2601.20218; TempFlow-GRPO, https://arxiv.org/abs/2508.04324).
        groups: (N,) integers; samples of one prompt share theirs.
        normalise: False leaves out the division, which weighs prompts by how little their rewards differ (Dr. GRPO,
            https://arxiv.org/abs/2503.20783).
        global_std: divide by the standard deviation of all rewards, the default of Flow-GRPO's official code (yifan123/flow_grpo, ac4c86e), which keeps
            groups of nearly equal rewards from blowing up noise; otherwise by the group's own, as in the paper (eq. 2).
        zero_std: what groups of equal rewards are, whose advantages are 0. "keep": part of the batch, as in the papers, so the
            update shrinks with their number. "drop": left out of its mean; the other advantages grow by N / (samples left), at
            each step (DAPO, https://arxiv.org/abs/2503.14476, samples others in their place). Samples of NaN rewards are left
            out with them.
        eps: 1e-4 as in the official code: smaller values amplify rounding noise among tied rewards. One for each column, (K,), or one for all.
        ddof: 0 is numpy's and the official code's; 1 is torch's default (DanceGRPO).

    Returns:
        Shaped like `rewards`; 0 for NaN rewards and for groups whose rewards are all equal.

    Raises:
        ValueError: `zero_std` is neither "keep" nor "drop".
    """
    if zero_std not in ("keep", "drop"):
        raise ValueError(f'zero_std is "keep" or "drop", got {zero_std!r}.')
    scale = _mean_std(rewards, ddof)[1]

    def of_group(own: Tensor) -> Tensor:
        mean, std = _mean_std(own, ddof)
        return (own - mean) / ((scale if global_std else std) + eps) if normalise else own - mean

    advantages = _within_groups(rewards, groups, of_group)
    if zero_std == "drop":
        left = _within_groups(rewards, groups, lambda own: _differ(own) & ~own.isnan())
        advantages *= len(rewards) / left.sum(0).clamp(min=1)
    return advantages.to(rewards.dtype)


def _differ(rewards: Tensor) -> Tensor:
    """Whether the rewards of each column that could be scored are not all equal: of no rounding error, unlike std > 0."""
    return rewards.nan_to_num(-torch.inf).amax(0) > rewards.nan_to_num(torch.inf).amin(0)


def leave_one_out_advantages(rewards: Tensor, groups: Tensor) -> Tensor:
    """r - mean of the group's other samples, (N,) or (N, K). RLOO (https://arxiv.org/abs/2402.14740, section 2.3).

    A sample's own reward is not part of its baseline, so the policy gradient is unbiased, as it is not with the group's mean
    (smaller by (n - 1) / n) or its standard deviation. A group of one has no others: 0.
    """

    def of_group(own: Tensor) -> Tensor:
        count = (~own.isnan()).sum(0)
        return (own - _mean_std(own, 0)[0]) * count / (count - 1).clamp(min=1)

    return _within_groups(rewards, groups, of_group).to(rewards.dtype)


def multi_reward_advantages(components: Tensor, weights: Tensor, groups: Tensor, *, eps: float = 1e-4, ddof: int = 0) -> Tensor:
    """Each reward is normalised in its group, then they are weighted, summed, and normalised over the batch. GDPO
    (https://arxiv.org/abs/2601.05242): no reward drowns another by its scale, and samples whose sums agree by chance differ.

    Args:
        components: (M, N), M rewards of N samples.
        weights: (M,); a component of weight 0 is left out, with its NaN.
        groups: (N,) integers.
        eps, ddof: as in `group_advantages`, for both normalisations; `eps` shrinks with the spread of a reward whose standard deviation over the batch is
            below 0.01, where the official constant would take its weight away, unless that spread is no more than float32's rounding.

    Returns:
        (N,); 0 for samples with a NaN or an infinity in any component, which enter no statistic of the others.
    """
    rewards = components[weights != 0].T
    unscored = ~rewards.isfinite().all(1)
    rewards = rewards.masked_fill(unscored[:, None], torch.nan)
    spread, noise = _mean_std(rewards, ddof)[1], ROUNDING * rewards.abs().nan_to_num(0.0).amax(0)
    own_eps = eps * torch.where(spread > noise, spread / SMALL_SPREAD, 1.0).clamp(max=1.0)
    advantages = group_advantages(rewards, groups, global_std=False, eps=own_eps, ddof=ddof)
    total = (advantages * weights[weights != 0]).sum(1)
    return batch_advantages(total.masked_fill(unscored, torch.nan), eps=eps, ddof=ddof)


class PromptStatistics:
    """Running mean and std of each prompt's rewards (DDPO, https://arxiv.org/abs/2305.13301, section 5.1).

    A prompt seen fewer than `min_count` times borrows the batch's statistics. Unlike in the official code, the state can be
    saved, so that a resumed run goes on exactly.

    Args:
        buffer_size: latest rewards kept for each prompt.
        normalise: False subtracts the mean alone, as a baseline.

    Raises:
        ValueError: `buffer_size` is below `min_count`, so that no prompt would ever have statistics of its own.
    """

    def __init__(self, buffer_size: int = 32, min_count: int = 16, eps: float = 1e-6, normalise: bool = True):
        if buffer_size < min_count:
            raise ValueError(f"buffer_size {buffer_size} never holds the {min_count} rewards of min_count, from which on a prompt has its own statistics.")
        self.buffer_size, self.min_count, self.eps, self.normalise = buffer_size, min_count, eps, normalise
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
            advantages[i] = (rewards[i] - mean) / (std + self.eps if self.normalise else 1)
        return advantages.nan_to_num(0.0)

    def state_dict(self) -> dict[str, list[float]]:
        return {prompt: list(kept) for prompt, kept in self.rewards.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        self.rewards = {prompt: deque(kept, maxlen=self.buffer_size) for prompt, kept in state.items()}
