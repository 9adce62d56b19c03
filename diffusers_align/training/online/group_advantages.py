"""The advantages that the flags of groups (`flags.methods.GroupArguments`) ask for."""

from __future__ import annotations

import torch
from torch import Tensor

from ...rewards.base import Reward, WeightedSum
from ...rl import group_advantages, leave_one_out_advantages, multi_reward_advantages
from ..flags.methods import GroupArguments
from .sampling import Samples


def advantages_of(samples: Samples, args: GroupArguments, reward: Reward, rewards: Tensor | None = None) -> Tensor:
    """The advantages that the flags ask for, clamped: (N,) on the CPU, or shaped like `rewards`.

    Args:
        reward: what made the samples' rewards; `--multi_reward gdpo` needs a sum of several, whose parts `samples.components` holds.
        rewards: (N,) or (N, K) in the place of `samples.rewards`.

    Raises:
        ValueError: `gdpo` with a single reward, with rewards that are no longer the sum's parts, or with another baseline than the group's.
    """
    if args.multi_reward == "gdpo":
        if args.baseline != "group":
            raise ValueError("--multi_reward gdpo normalises each reward in its group: leave out --baseline leave_one_out.")
        if not isinstance(reward, WeightedSum) or rewards is not None:
            raise ValueError("--multi_reward gdpo needs a sum of rewards, such as --reward 'clip_score*1+aesthetic*0.1', and one reward a sample.")
        # A sample whose sum was masked is no sample, whatever its parts say.
        parts = torch.stack([samples.components[name] for name in reward.names]).masked_fill(samples.rewards.isnan(), torch.nan)
        advantages = multi_reward_advantages(parts, torch.tensor(reward.weights), samples.groups, ddof=args.std_ddof)
    else:
        rewards = samples.rewards if rewards is None else rewards
        if args.baseline == "leave_one_out":
            advantages = leave_one_out_advantages(rewards, samples.groups)
        else:
            advantages = group_advantages(rewards, samples.groups, global_std=args.global_std, ddof=args.std_ddof)
    return advantages.clamp(-args.adv_clip_max, args.adv_clip_max)
