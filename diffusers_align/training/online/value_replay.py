"""The transitions that a Q-function over noises is fitted to: where the steps led, and what that turned out to be worth.

`train_value_steering.py` alone has it: the other learned value, of `online.value_baseline`, is of the states before the steps.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ...algorithms.value_steering import q_targets
from ...policy import Policy
from .sampling import Samples


class Replay:
    """The latest transitions, the same on every process, and the minibatches drawn from them; part of checkpoints.

    Args:
        size: transitions kept.
        seed: of the minibatches.
    """

    def __init__(self, size: int, seed: int):
        self.size, self.generator = size, torch.Generator().manual_seed(seed)
        self.columns: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.columns[0]) if self.columns else 0

    def add(self, states: Tensor, prompts: Tensor, steps: Tensor, targets: Tensor) -> None:
        """Take in states (N, *D) with prompt features (N, E), solver steps (N,) and what their values are to be (N,). Targets of NaN are left out."""
        known = ~targets.isnan()
        new = [column[known] for column in (states, prompts, steps, targets)]
        joined = [torch.cat(pair) for pair in zip(self.columns, new)] if self.columns else new
        self.columns = [column[-self.size :].clone() for column in joined]

    def draw(self, number: int) -> tuple[Tensor, ...]:
        """A minibatch: states, prompts, steps and targets of so many transitions, or of all if there are fewer."""
        index = torch.randperm(len(self), generator=self.generator)[:number]
        return tuple(column[index] for column in self.columns)

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state(), "columns": self.columns}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        self.columns = list(state["columns"])


def remember(replay: Replay, policy: Policy, samples: Samples, worth: list[Tensor], lam: float) -> tuple[Tensor, Tensor]:
    """Add an epoch's transitions, of all processes: of each noisy step the state behind it.

    Args:
        worth: for each of the samples' batches (B, L), what the candidates of each step were worth.
        lam: of `algorithms.value_steering.q_targets`.

    Returns:
        The targets (N, L) and `worth` (N, L), of all samples in order.
    """
    steps, mine = samples.batches[0].noisy_steps, []
    for trajectory, index, own in zip(samples.batches, samples.index, worth):
        states = trajectory.actions[:, steps].float().cpu()
        prompts = policy.prompt_features(trajectory.condition).cpu()
        mine += zip(index.tolist(), states, prompts, own.float().cpu())
    _, states, prompts, worth_of_all = zip(*sorted(gather_object(mine), key=lambda row: row[0]))
    worth_of_all = torch.stack(worth_of_all)
    targets = q_targets(samples.rewards.float(), worth_of_all, lam=lam)
    number, length = targets.shape
    behind = torch.tensor(steps).add(1).repeat(number)
    replay.add(torch.cat(states), torch.stack(prompts).repeat_interleave(length, 0), behind, targets.flatten())
    return targets, worth_of_all
