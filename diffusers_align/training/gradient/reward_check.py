"""Before training: whether the reward's gradient comes through the pipeline, and how many frames there are to score."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from ...data.prompts import Prompt
from ...gradients.check import UnscoredError, check_gradient
from ...gradients.rollout import count_steps, differentiable_rollout
from ...policy import Policy, noise_seed
from ...rewards import InvalidReward
from ...rewards.base import listed
from ..run.inputs import condition_of
from .bound_rewards import bound_reward

# So many prompts are tried for one that the reward can score.
MAX_CHECKED = 8


def check_on_prompts(run, policy: Policy, report, *, stochastic: bool, **options: Any) -> int:
    """`check_gradient` on the first of a few prompts that the reward can score."""
    first, failures = report.prompts[:MAX_CHECKED], []
    for prompt in first:
        condition = condition_of(policy, [prompt], seeds=[noise_seed(run.args.seed, "check")])
        steps = count_steps(policy, condition, stochastic=stochastic)
        reward = bound_reward(report.reward, [prompt], run.args, policy)
        with contextlib.suppress(UnscoredError), run.accelerator.autocast():
            check_gradient(policy, condition, reward, grad_steps=[steps - 1], stochastic=stochastic, **options)
            return steps
        failures += reward.failures
    raise InvalidReward(
        f"The reward could score none of the first {len(first)} prompts: {listed([prompt.text for prompt in first], MAX_CHECKED)}. "
        f"{' '.join([*failures[:1], 'Nothing is left to train on: repair the reward or change the prompts.'])}"
    )


@torch.no_grad()
def count_frames(policy: Policy, prompt: Prompt) -> int | None:
    """The frames of a video; None for pipelines that make images. Costs one denoiser call and the autoencoder's."""
    rollout = differentiable_rollout(policy, condition_of(policy, [prompt], seeds=[0]), grad_steps=[], stop_step=0)
    return rollout.images.shape[1] if rollout.images.ndim == 5 else None
