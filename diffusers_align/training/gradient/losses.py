"""The loss of a differentiable reward: its map, the distance to the pretrained model, the samples that have a reward."""

from __future__ import annotations

import torch
from torch import Tensor

from ...algorithms.draft import deviation
from ...gradients.rollout import DifferentiableRollout, outputs_along
from ...policy import Policy
from ...rl.reward_maps import RewardMap
from ..flags.methods import RewardGradientArguments


def reward_map(args: RewardGradientArguments) -> RewardMap:
    """The map of `--reward_map`, `--reward_target` and `--reward_scale`, for the loss of the algorithm's page."""
    return RewardMap(args.reward_map, args.reward_target, args.reward_scale)


def distance_to_reference(policy: Policy, rollout: DifferentiableRollout) -> Tensor:
    """Mean over the gradient steps of `draft.deviation`, (B,): nats per dimension where a step is stochastic, the mean squared
    difference of the models' outputs where it is not. Its gradient is the whole one, through the states to the steps before."""
    reference = outputs_along(policy, rollout, reference=True)
    found = [
        deviation(step.model_output.float(), reference[k].model_output.float(), step.transition, reference[k].transition, per_dim=rollout.latents[0].numel())
        for k, step in rollout.steps.items()
    ]
    return torch.stack(found).mean(0)


def total_loss(policy: Policy, rollout: DifferentiableRollout, loss: Tensor, args: RewardGradientArguments, logged: dict[str, list[float]]) -> Tensor:
    """The loss (B,) with `--kl_weight` times the distance to the pretrained model, which is logged."""
    if args.kl_weight == 0:
        return loss
    kl = distance_to_reference(policy, rollout)
    logged["kl"].append(kl.mean().item())
    return loss + args.kl_weight * kl


def scored_sum(loss: Tensor) -> Tensor:
    """The sum over the samples that the reward could score; 0 with a graph if there are none."""
    return torch.where(loss.isnan(), 0.0, loss).sum()


def finite(values: Tensor) -> list[float]:
    """The numbers among `values`, for the log."""
    return [value for value in values.tolist() if value == value]
