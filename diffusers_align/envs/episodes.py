r"""Samplings as episodes of a Markov decision process, one noisy solver step after another.

The state is $(x_t, t, c)$, the action is the noise $\epsilon_t$ of a step, and the sampler's own kernel is the transition:
$x_{t-1} = \mu_\theta(x_t, t, c) + \mathrm{std}_t\,\epsilon_t$. Actions that are drawn from $\mathcal N(0, I)$ are the sampler itself. Steps without noise are
no decisions: they are taken on the way to the next one that has it.

Between two steps the pipeline stands still outside its call: the next step calls it again, with what is known already at no cost
(`pipelines.particles.Walk`), so that a step is one denoiser call and nothing of the pipeline is held open.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..checks.ranges import Count, Positive, checked
from ..condition import Condition
from ..driving.noise import noise_seed, step_streams
from ..pipelines.base import WrappedPipeline
from ..pipelines.judge import Judge
from ..pipelines.particles import Particles, Walk
from ..policy import Policy
from ..rewards import load_reward
from ..trajectory import Trajectory
from ..transition import standard_normal


@dataclass(frozen=True)
class Task:
    """What episodes are of: a policy, its prompts and what is rewarded.

    Attributes:
        policy: its current weights are the transition.
        condition: one of each prompt.
        judge: gives the rewards of images, by prompt.
        features: (P, E) float32, of each prompt.
        trajectory: a roll-out of the first prompt, for the sizes and the schedule.
        dense: whether steps have rewards: the gains of the predicted clean sample's.
        num_candidates: noises to choose from at each step; None where the action is the noise itself.
        bound: largest value of an action that is a noise.
    """

    policy: Policy
    condition: Condition
    judge: Judge
    features: Tensor
    trajectory: Trajectory
    dense: bool
    num_candidates: int | None
    bound: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a sample's state."""
        return tuple(self.trajectory.states.shape[2:])

    @property
    def num_decisions(self) -> int:
        """Noisy solver steps, so the length of every episode."""
        return len(self.trajectory.noisy_steps)

    def time(self, k: int | None) -> float:
        """The time of solver step k, from 1 (the most noise) to 0 (the end, None)."""
        low, high = self.policy.scheduler.time_range
        share = 0.0 if k is None else (float(self.trajectory.timesteps[k]) - low) / (high - low)
        return min(max(share, 0.0), 1.0)


@checked
def make_task(
    policy: Policy,
    prompts: list[str] | Condition,
    reward: Any,
    *,
    action: Literal["noise", "candidates"] = "noise",
    num_candidates: Count = 8,
    rewards: Literal["final", "gains"] = "final",
    columns: dict[str, list] | None = None,
    features: Tensor | None = None,
    noise_bound: Positive = 8.0,
) -> Task:
    """The task of an environment. It samples the first prompt twice.

    Args:
        policy: any policy; its weights stay as they are.
        prompts: what episodes are drawn from, or a condition, whose seeds do not matter.
        reward: a name or a callable (images, prompts, **columns) -> (B,).
        action: `noise`, the noise of each step; or `candidates`, which of `num_candidates` to take.
        rewards: `final`, at the last step alone; `gains`, of each step what it adds to the reward of the predicted clean sample: their sum is the final
            reward less that of the first prediction (a potential, https://dl.acm.org/doi/10.5555/645528.657613, so that the best policy is the same).
        columns: other arguments of the reward, a list for each with an entry per prompt.
        features: (P, E) of the prompts; their encodings, averaged over tokens (`Policy.prompt_features`), if absent.
        noise_bound: actions lie in [-noise_bound, noise_bound]: libraries want a bound, and normal draws do not reach 8.

    Raises:
        ValueError: no prompts, no features of them, no step with noise, or a pipeline that cannot be left and resumed (it carries state from step to step, or
            draws what no seed fixes).
    """
    condition = replace(prompts if isinstance(prompts, Condition) else policy.condition(prompts), seeds=None, step_seeds=None)
    features = _features(policy, condition) if features is None else features.detach().float().cpu()
    if features.ndim != 2 or len(features) != len(condition):
        raise ValueError(f"features are a tensor with a row for each of the {len(condition)} prompts, got {tuple(features.shape)}.")
    trajectory = policy.rollout(replace(condition.select([0]), seeds=[0]))
    if not trajectory.noisy_steps:
        raise ValueError("No step of this sampler has noise, so that there is no action: raise the scheduler's noise (`eta`, `noise_level`).")
    policy.check_reproducible(trajectory)
    policy.complete(trajectory, min(1, trajectory.num_steps - 1))  # refuses what cannot be left and resumed
    judge = Judge.of(load_reward(reward, device=policy.device), condition, columns, pipeline=policy.pipeline)
    chosen = num_candidates if action == "candidates" else None
    return Task(policy, condition, judge, features, trajectory, rewards == "gains", chosen, noise_bound)


class Episodes:
    """Episodes of a task, one for each of the B `rows` of its prompts, that take their steps together.

    Args:
        rows: B numbers of prompts.
        seeds: B whole numbers: the initial noise of each, and candidates. The first candidate of each step is the noise that `Policy.rollout` would draw.
    """

    def __init__(self, task: Task, rows: list[int], seeds: list[int]):
        self.task, self.rows, self.seeds = task, rows, seeds
        condition = replace(task.condition.select(rows), seeds=seeds)
        wrapped = WrappedPipeline(task.policy.pipeline)
        wrapped.prompt_memory = task.policy.prompt_memory  # so that prompts are encoded once, and not in each episode
        self.walk = Walk(wrapped, condition, seeds)
        self.own = step_streams(seeds)
        self.left = list(task.trajectory.noisy_steps)
        self.potential: Tensor | None = None
        self._go(None, None)

    @property
    def ended(self) -> bool:
        """Whether the samples are drawn."""
        return self.at.k is None

    def step(self, actions: np.ndarray) -> np.ndarray:
        """Take the step of each episode: noises (B, *D), or numbers of candidates (B,). Returns the rewards (B,) float32, 0 where none is due.

        Raises:
            ValueError: the episodes have ended, or actions of another shape, of no candidate, or not finite.
        """
        if self.ended:
            raise ValueError("The episode has ended: reset the environment.")
        noise, kernel = self._noise_of(actions), self.at.transition
        self._go(self.at, kernel.mean + kernel.std * noise.to(kernel.mean))
        return self._rewards()

    def observation(self) -> dict[str, np.ndarray]:
        """What is seen of each episode, by name, (B, ...) float32: `sample`, `time` and `condition`, with the `candidates` to choose from."""
        number = len(self.rows)
        seen = {
            "sample": self.at.states[0].float().cpu(),
            "time": torch.full((number, 1), self.task.time(self.at.k)),
            "condition": self.task.features[self.rows],
        }
        if self.task.num_candidates is not None:
            seen["candidates"] = self.candidates
        return {name: x.numpy() for name, x in seen.items()}

    def _go(self, start: Particles | None, drawn: Tensor | None) -> None:
        rows, stop = list(range(len(self.rows))), self.left.pop(0) if self.left else None
        with torch.no_grad(), self.task.policy.schedulers_in_place():
            self.at = self.walk.advance(rows, start, stop, drawn=drawn)
            if self.task.num_candidates is not None:
                self.candidates = torch.stack([self._candidates(i) for i in rows])
            if self.task.dense and start is None:
                self.potential = self._judged()

    def _candidates(self, i: int) -> Tensor:
        """The noises (n, *D) that episode i may take at this step, float32; zeros at the end."""
        task, state = self.task, self.at.states[0]
        shape = (1, *state.shape[1:])
        if self.ended:
            return torch.zeros(task.num_candidates, *state.shape[1:])
        other = torch.Generator().manual_seed(noise_seed(self.seeds[i], "candidates", self.at.k))
        streams = [self.own[i], *[other] * (task.num_candidates - 1)]
        return torch.cat([standard_normal(shape, g, torch.device("cpu"), state.dtype) for g in streams]).float()

    def _noise_of(self, actions: np.ndarray) -> Tensor:
        state = self.at.states[0]
        wanted = (len(state),) if self.task.num_candidates is not None else tuple(state.shape)
        if np.shape(actions) != wanted:
            raise ValueError(f"Actions of these {len(state)} episodes have shape {wanted}, got {np.shape(actions)}.")
        actions, last = torch.as_tensor(np.asarray(actions)).double(), self.task.num_candidates
        if not bool((actions.isfinite() if last is None else (actions >= 0) & (actions < last) & (actions == actions.floor())).all()):
            wanted = "finite noises" if last is None else f"numbers of candidates, from 0 to {last - 1}"
            raise ValueError(f"Actions are {wanted}, got {actions.flatten()[:8].tolist()}.")
        return actions.float() if last is None else self.candidates[torch.arange(len(state)), actions.long()]

    def _rewards(self) -> np.ndarray:
        if not self.task.dense:
            return self._judged().numpy() if self.ended else np.zeros(len(self.rows), np.float32)
        before, self.potential = self.potential, self._judged()
        return (self.potential - before).numpy()

    def _judged(self) -> Tensor:
        """Rewards (B,) of what the predicted clean samples are like; of the samples, at the end."""
        with torch.no_grad(), self.task.policy.schedulers_in_place():
            return self.task.judge(self.walk.decode(self.at, list(range(len(self.rows)))), self.rows).float().cpu()


def _features(policy: Policy, condition: Condition) -> Tensor:
    try:
        return policy.prompt_features(replace(condition, seeds=[0] * len(condition))).cpu()
    except ValueError as error:
        name = type(policy.pipeline).__name__
        raise ValueError(f"{name} has no encoded prompts to observe ({error}): give features, a tensor with a row for each prompt.") from error
