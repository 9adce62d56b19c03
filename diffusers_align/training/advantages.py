"""What the group-relative scripts share: the flags of groups and advantages, and the advantages that they ask for."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from ..rewards.base import Reward, WeightedSum
from ..rl import group_advantages, leave_one_out_advantages, multi_reward_advantages
from .sampling import Samples


def add_group_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the groups and their advantages; the defaults are Flow-GRPO's (https://arxiv.org/abs/2505.05470, official code)."""
    group = parser.add_argument_group("groups and advantages")
    group.add_argument("--num_prompts_per_epoch", type=int, default=48, help="groups an epoch")
    group.add_argument("--group_size", type=int, default=24, help="samples of a prompt")
    group.add_argument("--same_latent", action=argparse.BooleanOptionalAction, default=False, help="one initial noise a group (DanceGRPO's default)")
    group.add_argument("--adv_clip_max", type=float, default=5.0)
    group.add_argument("--global_std", action=argparse.BooleanOptionalAction, default=True, help="divide advantages by the std of all rewards")
    group.add_argument("--std_ddof", type=int, choices=[0, 1], default=0, help="0 divides the variance by n (numpy), 1 by n - 1 (torch, DanceGRPO)")
    group.add_argument(
        "--baseline", choices=["group", "leave_one_out"], default="group", help="of a sample: its group's mean, over the std; or the others' mean alone (RLOO)"
    )
    group.add_argument("--multi_reward", choices=["sum", "gdpo"], default="sum", help="of a sum of rewards: add up first, or normalise each in its group first")


def advantages_of(samples: Samples, args: argparse.Namespace, reward: Reward, rewards: Tensor | None = None) -> Tensor:
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
