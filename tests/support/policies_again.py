"""Policies that are called again, and the errors of their replay."""

import torch
from tiny_pipelines import FAMILIES

from diffusers_align import Policy, Trajectory


def policy_of(name: str = "sd15", **call) -> Policy:
    family = FAMILIES[name]
    return Policy(family.build(), **{**family.call, **call})


def errors_of_replay(policy: Policy, trajectory: Trajectory, steps=None) -> list[float]:
    found = []

    def compare(k, kernel):
        found.append(float((kernel.log_prob(trajectory.actions[:, k]) - trajectory.log_probs[:, k]).abs().max()))

    with torch.no_grad():
        policy.replay(trajectory, compare, steps)
    return found


def changed(pipeline, method: str, change):
    """Replace a method of this pipeline by `change(stock, *args, **kwargs)`."""
    stock = getattr(pipeline, method)
    pipeline.__dict__[method] = lambda *args, **kwargs: change(stock, *args, **kwargs)
