"""Sampling and scoring: an epoch's rollouts across processes, and evaluation at fixed prompts and seeds."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ..data.prompts import Prompt, prompts_of_epoch
from ..policy import Policy, noise_seed
from ..rewards import score
from ..trajectory import Trajectory


@dataclass
class Samples:
    """One epoch's samples. Lists and tensors of length N are of all processes, in one order that all know.

    Attributes:
        batches: this process's trajectories, in the batches in which they are to be replayed: equal shapes make equal bits.
        index: for each of `batches`, the positions (B,) of its samples among the N.
        prompts: N texts.
        groups: (N,) integers, equal where prompt and occasion are.
        rewards: (N,) float32; NaN where masked.
        components: every reward by name, (N,).
    """

    batches: list[Trajectory]
    index: list[Tensor]
    prompts: list[str]
    groups: Tensor
    rewards: Tensor
    components: dict[str, Tensor]

    def metrics(self) -> dict[str, float]:
        """Mean and s.e. of the reward, its spread within groups, the share of groups without any, means of its components."""
        valid = self.rewards[~self.rewards.isnan()]
        out = {"reward": valid.mean(), "reward_se": valid.std() / max(1, len(valid)) ** 0.5}
        if len(self.groups.unique()) < len(self.groups):
            spread = torch.stack([_spread(self.rewards[self.groups == g]) for g in self.groups.unique()])
            out |= {"reward_std": spread.mean(), "zero_std": (spread < 1e-6).float().mean()}
        parts = {f"reward/{name}": values[~values.isnan()].mean() for name, values in self.components.items() if name != "reward"}
        invalid = {"invalid_rewards": self.rewards.isnan().sum()} if len(valid) < len(self.rewards) else {}
        return {name: float(value) for name, value in {**out, **parts, **invalid}.items()}


def _spread(rewards: Tensor) -> Tensor:
    valid = rewards[~rewards.isnan()]
    return valid.std(correction=0) if len(valid) else torch.zeros(())


def sample_epoch(run, policy: Policy, reward, prompts: list[Prompt], epoch: int, num_prompts: int, group_size: int, same_latent: bool = False) -> Samples:
    """Roll out `group_size` samples of each of `num_prompts` prompts and score them.

    Noise is keyed by (seed, epoch, prompt, sample), so neither the batch size nor the number of processes changes a sample.

    Args:
        same_latent: the samples of a group share their initial noise, so that their rewards differ by the steps' noise alone.
    """
    args, accelerator = run.args, run.accelerator
    chosen = prompts_of_epoch(prompts, num_prompts, args.seed, epoch)
    order = [(group, sample) for group in range(num_prompts) for sample in range(group_size)]
    random.Random(f"{args.seed}/{epoch}/order").shuffle(order)
    step_seeds = [noise_seed(args.seed, epoch, group, chosen[group], sample) for group, sample in order]
    seeds = [noise_seed(args.seed, epoch, group, chosen[group]) for group, _ in order] if same_latent else step_seeds
    mine = list(range(len(order)))[accelerator.process_index :: accelerator.num_processes]
    batches, index, results = [], [], []
    for start in range(0, len(mine), args.train_batch_size):
        part = mine[start : start + args.train_batch_size]
        asked = [prompts[chosen[order[i][0]]] for i in part]
        with accelerator.autocast():
            trajectory = policy.rollout([p.text for p in asked], seeds=[seeds[i] for i in part], step_seeds=[step_seeds[i] for i in part])
        batches.append(trajectory)
        index.append(torch.tensor(part))
        with torch.no_grad():
            images = policy.decode(trajectory.final, trajectory.condition).float()
        results += [(i, row) for i, row in zip(part, _score_rows(reward, images, asked, args.invalid_rewards))]
    gathered = sorted(gather_object(results), key=lambda pair: pair[0])
    components = {name: torch.tensor([row[name] for _, row in gathered]) for name in gathered[0][1]}
    groups = torch.tensor([group for group, _ in order])
    return Samples(batches, index, [prompts[chosen[g]].text for g, _ in order], groups, components["reward"], components)


def _score_rows(reward, images: Tensor, prompts: list[Prompt], on_invalid: str) -> list[dict[str, float]]:
    columns: dict[str, list[Any]] = {name: [p.columns.get(name) for p in prompts] for name in prompts[0].columns}
    with torch.no_grad():
        scores = score(reward, images, [p.text for p in prompts], on_invalid=on_invalid, **columns)
    return [{name: float(values[i]) for name, values in scores.items()} for i in range(len(prompts))]


@dataclass
class Evaluation:
    """Deterministic samples at fixed prompts and seeds, with their rewards by name, (N,) each."""

    prompts: list[str]
    images: list[Tensor]
    rewards: dict[str, Tensor]


def evaluate(run, policy: Policy, rewards: dict[str, Any], prompts: list[Prompt], number: int, keep_images: int) -> Evaluation:
    """Sample `number` images along the ODE, prompt after prompt, seed after seed, and score them with each of `rewards`.

    Every process takes its share; all get the whole result (images: the first `keep_images`).
    """
    args, accelerator = run.args, run.accelerator
    jobs = [(i, prompts[i % len(prompts)], noise_seed(args.seed, "evaluation", i)) for i in range(number)]
    mine, rows = jobs[accelerator.process_index :: accelerator.num_processes], []
    call = {"num_inference_steps": args.eval_num_inference_steps, "guidance_scale": args.eval_guidance_scale}
    call = {name: value for name, value in call.items() if value is not None}
    for start in range(0, len(mine), args.train_batch_size):
        part = mine[start : start + args.train_batch_size]
        with accelerator.autocast():
            trajectory = policy.rollout([p.text for _, p, _ in part], seeds=[seed for _, _, seed in part], deterministic=True, **call)
        with torch.no_grad():
            images = policy.decode(trajectory.final, trajectory.condition).float().cpu()
        scored = {name: _score_rows(reward, images.to(accelerator.device), [p for _, p, _ in part], "mask") for name, reward in rewards.items()}
        for j, (i, _, _) in enumerate(part):
            flat = {f"{name}/{key}" if key != "reward" else name: value for name in rewards for key, value in scored[name][j].items()}
            rows.append((i, images[j] if i < keep_images else None, flat))
    rows = sorted(gather_object(rows), key=lambda row: row[0])
    names = rows[0][2]
    return Evaluation([p.text for _, p, _ in jobs], [image for _, image, _ in rows[:keep_images]], {n: torch.tensor([r[2][n] for r in rows]) for n in names})


def paired_gain(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Mean of after - before over equal prompts and seeds, and its standard error. Pairs with a NaN are left out."""
    difference = (after - before)[~(after - before).isnan()]
    return float(difference.mean()), float(difference.std() / max(1, len(difference)) ** 0.5)
