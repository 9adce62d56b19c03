"""A pool of candidates for each prompt, of which the extremes are trained on: the scout pool of Sol-RL (https://arxiv.org/abs/2604.06916).

Candidates are sampled cheaply, along the ODE in few steps, and scored. The best and the worst of each prompt are sampled anew from the same initial noise,
as a run without a pool would sample them; their rewards are the ones that count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...data.prompts import Prompt
from ...policy import Policy
from ..run.inputs import condition_of
from .scoring import Scorer, gather_scores


@dataclass(frozen=True)
class Asked:
    """What an epoch's samples are made of, each list of length N.

    Attributes:
        prompts: with the data set's other fields.
        groups: numbers, equal where rewards are compared.
        seeds, step_seeds: of the initial noise and of the steps'.
    """

    prompts: list[Prompt]
    groups: list[int]
    seeds: list[int]
    step_seeds: list[int]

    def select(self, positions: list[int]) -> Asked:
        """Those at some positions."""
        return Asked(*([values[i] for i in positions] for values in (self.prompts, self.groups, self.seeds, self.step_seeds)))


def scouted(run, policy: Policy, reward, candidates: Asked, size: int, **call_kwargs: Any) -> tuple[Asked, Tensor]:
    """The `size` candidates of each group whose scout samples have the extreme rewards, in the candidates' order, and those rewards (N,).

    Raises:
        ValueError: the pipeline's call takes no number of steps.
    """
    if "num_inference_steps" not in policy.parameters:
        raise ValueError(f"--scout_pool samples in --scout_steps steps, and {policy.calls.name} takes no num_inference_steps. Leave it out")
    rewards = _scout_rewards(run, policy, reward, candidates, num_inference_steps=run.args.scout_steps, **call_kwargs)
    kept = extremes(rewards, candidates.groups, size)
    return candidates.select(kept), rewards[kept]


def extremes(rewards: Tensor, groups: list[int], size: int) -> list[int]:
    """Positions of the `size` samples of each group with the extreme rewards, half of them the worst and half the best (of an odd number one more), in order.
    Of equal ones the earlier count as the worse. Without a reward (NaN) they are taken where the others do not suffice."""
    kept: list[int] = []
    values = rewards.tolist()
    for group in sorted(set(groups)):
        members = [i for i, own in enumerate(groups) if own == group]
        ranked = sorted((i for i in members if values[i] == values[i]), key=lambda i: values[i])
        number = min(size, len(ranked))
        kept += [*ranked[: number // 2], *ranked[len(ranked) - (number - number // 2) :]]
        kept += [i for i in members if values[i] != values[i]][: size - number]
    return sorted(kept)


@torch.no_grad()
def _scout_rewards(run, policy: Policy, reward, asked: Asked, **call_kwargs: Any) -> Tensor:
    """(N,), on all processes; NaN where masked."""
    rank, world, size = run.accelerator.process_index, run.accelerator.num_processes, run.args.train_batch_size
    number = len(asked.prompts)
    mine = range(rank, -(-number // world) * world, world)  # beyond the last one the first again, so that all processes make as many calls
    policy.expect_prompts(asked.prompts[i % number].text for i in mine)
    with Scorer.of_run(reward, run.args) as scorer:
        for start in range(0, len(mine), size):
            part = mine[start : start + size]
            own = asked.select([i % number for i in part])
            with run.accelerator.autocast():
                condition = condition_of(policy, own.prompts, seeds=own.seeds, **call_kwargs)
                made = policy.outcome(policy.rollout(condition, deterministic=True)).to(torch.float32)
            run.meter.count_images(len(part))
            keys = [i for i in part if i < number]
            if keys:
                scorer.submit(keys, made[: len(keys)], own.prompts[: len(keys)])
        return gather_scores(run, scorer, asked.prompts)["reward"]


def scout_metrics(scouted: Tensor, rewards: Tensor, groups: Tensor) -> dict[str, float]:
    """Of the samples trained on (N,): the spread of the scouts' rewards within a group, and their correlation there with the rewards that count."""
    here = ~(scouted.isnan() | rewards.isnan())
    pairs = [(scouted[here & (groups == g)], rewards[here & (groups == g)]) for g in groups.unique()]
    centred = [torch.stack([a - a.mean(), b - b.mean()]) for a, b in pairs if len(a) > 1]
    if not centred:
        return {}
    a, b = torch.cat(centred, 1)
    spread = torch.stack([own[0].square().mean().sqrt() for own in centred]).mean()
    return {"scout_std": float(spread), "scout_correlation": float((a * b).sum() / ((a.square().sum() * b.square().sum()).sqrt() + 1e-12))}
