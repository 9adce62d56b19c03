"""What needs no training, around the stock pipeline."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from diffusers_align.pipelines import BestOfNPipeline, ParticleSteeringPipeline, RewardGuidedPipeline

from ..cell import Fault, require
from ..column import Column
from ..subject import Subject


def brightness(images: Tensor, prompts: list[str], sampling_rate: int | None = None, **columns: Any) -> Tensor:
    """Of pictures, and of sounds their mean."""
    return images.flatten(1).mean(1)


def likeness(images: Tensor, prompts: list[str], **columns: Any) -> Tensor:
    """To a random pattern of root mean square 1."""
    pattern = torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(4)).to(images)
    return (images * pattern).flatten(1).sum(1) / pattern.numel() ** 0.5


def _call(subject: Subject, cls: type, **options: Any):
    generators = [torch.Generator().manual_seed(seed) for seed in subject.seeds]
    own = {"per_sample": copy.deepcopy(subject.per_sample)} if subject.per_sample else {}
    prompts = subject.prompts or [""] * subject.size
    batch = {"batch_size": 1} if subject.case.one_sample and cls is not RewardGuidedPipeline else {}
    pipeline = cls(subject.build(), reward=options.pop("reward", brightness))
    return pipeline(prompts, generator=generators, output_type="pt", **copy.deepcopy(subject.case.call), **own, **batch, **options)


def best_of_n(subject: Subject) -> None:
    output = _call(subject, BestOfNPipeline, num_candidates=2)
    require(tuple(output.rewards.shape) == (subject.size, 2), f"Rewards {tuple(output.rewards.shape)}.")
    require(bool(output.rewards.isfinite().all()), "Rewards are not finite.")
    require(not torch.equal(output.rewards[:, 0], output.rewards[:, 1]), "Both candidates are the same.")


def reward_guided(subject: Subject) -> str | None:
    for reward, strength in ((brightness, 5.0), (likeness, 5e4)):
        options = {"reward": reward, "preset": "dps"}
        plain, steered = (_call(subject, RewardGuidedPipeline, reward_scale=scale, **options).rewards for scale in (0.0, strength))
        require(bool(steered.isfinite().all()), "Rewards are not finite.")
        if not torch.equal(plain, steered):
            return None if reward is brightness else "its tiny decoder hardly shows the latents: by likeness to a pattern, strongly"
    raise Fault("The guidance makes no difference.")


def particles(subject: Subject) -> None:
    output = _call(subject, ParticleSteeringPipeline, num_particles=2)
    require(tuple(output.rewards.shape) == (subject.size, 2), f"Rewards {tuple(output.rewards.shape)}.")
    require(bool(output.rewards.isfinite().all()), "Rewards are not finite.")


COLUMNS = (
    Column("best_of_n", "best", "best-of-n: `BestOfNPipeline(pipeline)`", best_of_n, ("stock",)),
    Column("reward_guided", "guide", "guidance by a reward's gradient: `RewardGuidedPipeline(pipeline)`", reward_guided, ("stock",)),
    Column("particles", "part", "particle steering: `ParticleSteeringPipeline(pipeline)`", particles, ("stock",)),
)
