"""A learned value of each state as the baseline of its step's advantage; the network is that of `diffusers_align.rl.values`."""

from __future__ import annotations

import random

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ...policy import Policy
from ...rl import batch_advantages
from ...rl.values import ValueBaseline, explained_variance, value_advantages, value_targets
from ..flags.methods import ValueArguments
from .sampling import Samples


def make_values(args: ValueArguments, device: torch.device) -> ValueBaseline:
    """The baseline that the flags ask for."""
    return ValueBaseline(
        args.num_inference_steps, learning_rate=args.value_learning_rate, batch_size=args.value_batch_size,
        accumulation_steps=args.value_accumulation_steps, buffer_size=args.value_buffer_size, seed=args.seed, device=device,
    )  # fmt: skip


def _of_all(mine: list[tuple]) -> list[tuple]:
    """What all processes have found, by sample and step, the same on each."""
    return sorted(gather_object(mine), key=lambda found: found[:2])


def _transitions_for_the_buffer(samples: Samples, features: list[Tensor], targets: Tensor, args: ValueArguments, epoch: int) -> tuple[Tensor, ...]:
    """Random transitions of the samples, the same on each process: states, prompt features, steps, targets."""
    steps = samples.batches[0].noisy_steps
    pairs = [(i, k) for i in range(len(targets)) for k in steps]
    number = min(len(pairs), max(1, args.value_buffer_size // 2))
    drawn = set(random.Random(f"{args.seed}/{epoch}/values").sample(pairs, number))
    mine = []
    for trajectory, prompts, index in zip(samples.batches, features, samples.index):
        for row, i in enumerate(index.tolist()):
            mine += [(i, k, trajectory.states[row, k].cpu(), prompts[row].cpu()) for k in steps if (i, k) in drawn]
    chosen, at_steps, states, prompts = zip(*_of_all(mine))
    places = [steps.index(k) for k in at_steps]
    return torch.stack(states), torch.stack(prompts), torch.tensor(at_steps), targets[list(chosen), places]


def _predicted(values: ValueBaseline, samples: Samples, features: list[Tensor]) -> Tensor:
    """V of each state with noise, (N, number of these)."""
    steps, mine = samples.batches[0].noisy_steps, []
    for trajectory, prompts, index in zip(samples.batches, features, samples.index):
        found = [values(trajectory.states[:, k], prompts, torch.full((len(trajectory),), k)).cpu() for k in steps]
        mine += [(i, 0, row) for i, row in zip(index.tolist(), torch.stack(found, 1))]
    return torch.stack([row for _, _, row in _of_all(mine)])


def learned_advantages(
    values: ValueBaseline, policy: Policy, samples: Samples, rewards: Tensor, args: ValueArguments, epoch: int, *, lam: float = 1.0
) -> tuple[Tensor, dict[str, list[float]]]:
    """The advantages of the samples' steps, (N, K), before the value network is fitted to them, and what to log. 0 at steps without noise.

    The steps with noise are the chain that values are about: what follows one of them, up to the next, is its outcome. Without a network as yet, the
    targets are what was earned, whatever `lam`.

    Args:
        rewards: (N,) of all processes' samples, or (N, K) of their steps.
        lam: of the advantages, and of the targets.
    """
    steps, first = samples.batches[0].noisy_steps, values.network is None
    features = [policy.prompt_features(trajectory.condition) for trajectory in samples.batches]
    earned = rewards[:, steps] if rewards.ndim == 2 else rewards
    before = _predicted(values, samples, features)
    values.remember(*_transitions_for_the_buffer(samples, features, value_targets(earned, before, lam=1.0 if first else lam), args, epoch))
    predicted = _predicted(values, samples, features) if first else before
    advantages = torch.zeros(len(rewards), samples.batches[0].num_steps, dtype=predicted.dtype)
    advantages[:, steps] = value_advantages(earned, predicted, lam=lam)
    explained = explained_variance(value_targets(earned, torch.zeros_like(predicted)), predicted)
    return advantages, {"explained_variance": [explained], "value_error": [values.fit(args.value_steps)]}


def normalised(advantages: Tensor, steps: list[int], limit: float) -> Tensor:
    """Advantages (N, K) less their mean, over their standard deviation, both over the samples and `steps` together, so that steps keep their weights
    beside each other; clamped to `limit` either way, and 0 elsewhere."""
    scaled = torch.zeros_like(advantages)
    scaled[:, steps] = batch_advantages(advantages[:, steps].flatten()).reshape(-1, len(steps)).clamp(-limit, limit)
    return scaled
