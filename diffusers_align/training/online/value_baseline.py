"""A learned value of each state as the baseline of its step's advantage; the network is that of `diffusers_align.rl.values`.

`train_dpok.py` alone has it: a replay buffer, and advantages that are taken before the fit, are a page of their own beside the policy's.
"""

from __future__ import annotations

import random

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ...policy import Policy
from ...rl.values import ValueBaseline, explained_variance, value_advantages
from .sampling import Samples


def make_values(args, device: torch.device) -> ValueBaseline:
    """The baseline that the flags ask for."""
    return ValueBaseline(
        args.num_inference_steps, learning_rate=args.value_learning_rate, batch_size=args.value_batch_size,
        accumulation_steps=args.value_accumulation_steps, buffer_size=args.value_buffer_size, seed=args.seed, device=device,
    )  # fmt: skip


def _transitions_for_the_buffer(samples, features, rewards, args, epoch):
    """Random transitions of all processes' samples, the same on each process: states, prompt features, steps, rewards."""
    steps = samples.batches[0].noisy_steps
    pairs = [(i, k) for i in range(len(rewards)) for k in steps]
    number = min(len(pairs), max(1, args.value_buffer_size // 2))
    drawn = set(random.Random(f"{args.seed}/{epoch}/values").sample(pairs, number))
    mine = []
    for trajectory, prompts, index in zip(samples.batches, features, samples.index):
        for row, i in enumerate(index.tolist()):
            mine += [(i, k, trajectory.states[row, k].cpu(), prompts[row].cpu()) for k in steps if (i, k) in drawn]
    chosen, at_steps, states, prompts = zip(*sorted(gather_object(mine), key=lambda found: found[:2]))
    return torch.stack(states), torch.stack(prompts), torch.tensor(at_steps), rewards[list(chosen)]


def _values_of(values, trajectory, prompts):
    """V of each state on a trajectory, (B, K)."""
    steps = [torch.full((len(trajectory),), k) for k in range(trajectory.num_steps)]
    return torch.stack([values(trajectory.states[:, k], prompts, step).cpu() for k, step in enumerate(steps)], 1)


def learned_advantages(values: ValueBaseline, policy: Policy, samples: Samples, rewards: Tensor, args, epoch: int) -> tuple[Tensor, dict[str, list[float]]]:
    """r - V of the samples' steps, (N, K), before the value network is fitted to them, and what to log. NaN for samples of other processes,
    whose states are not here.

    Args:
        rewards: (N,), of all processes' samples.
    """
    features = [policy.prompt_features(trajectory.condition) for trajectory in samples.batches]
    values.remember(*_transitions_for_the_buffer(samples, features, rewards, args, epoch))
    predicted = [_values_of(values, trajectory, prompts) for trajectory, prompts in zip(samples.batches, features)]
    advantages = torch.full((len(rewards), samples.batches[0].num_steps), torch.nan, dtype=rewards.dtype)
    for index, value in zip(samples.index, predicted):
        advantages[index] = value_advantages(rewards[index], value, lam=args.gae_lambda)
    explained = explained_variance(rewards[torch.cat(samples.index)], torch.cat(predicted))
    return advantages, {"explained_variance": [explained], "value_error": [values.fit(args.value_steps)]}
