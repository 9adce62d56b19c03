"""A small policy with a roll-out."""

import torch
from tiny_pipelines import FAMILIES

from diffusers_align import Policy

PROMPTS, SEEDS = ["a cat", "a dog", "a red bird", "a fish"], [1, 2, 3, 4]


def make(name="sd3", **call):
    policy = Policy(FAMILIES[name].build(), **{**FAMILIES[name].call, **call})
    trajectory = policy.rollout(PROMPTS, seeds=SEEDS)
    parameters = policy.add_lora(rank=4)
    torch.manual_seed(0)
    for parameter in parameters:
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    return policy, trajectory, parameters
