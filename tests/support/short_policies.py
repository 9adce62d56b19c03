"""Policies of tiny pipelines with three steps, and a reward for them."""

from tiny_pipelines import FAMILIES

from diffusers_align import Policy


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def policy_of(name="sd3", **call):
    return Policy(FAMILIES[name].build(), **{**FAMILIES[name].call, "num_inference_steps": 3, **call})
