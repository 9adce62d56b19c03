"""A tiny policy, its conditions and rewards for reward gradients."""

import argparse
import functools

import torch
from tiny_pipelines import FAMILIES

from diffusers_align import Policy


def loss_args(**flags):
    return argparse.Namespace(**{"reward_map": "none", "reward_target": None, "reward_scale": 1.0, "kl_weight": 0.0, "checkpoint_decoder": True, **flags})


def brightness(images, prompts, **columns):
    return images.flatten(1).mean(1)


@functools.cache
def tiny(family) -> Policy:
    policy = Policy(FAMILIES[family].build(), **FAMILIES[family].call)
    policy.add_lora(rank=2)
    torch.manual_seed(1)
    for module in policy.denoisers.values():
        for name, parameter in module.named_parameters():
            if ".lora_B." in name:
                parameter.data.normal_(std=0.3)
    return policy


def conditioned(policy):
    return policy.condition(["a cat", "a dog"], seeds=[1, 2])
