"""Stock pipelines that are differentiated, and small rewards."""

import functools

import diffusers
import pytest
import torch
from tiny_pipelines import FAMILIES

from diffusers_align import Policy
from diffusers_align.gradients.rollout import count_steps, differentiable_rollout

PROMPTS, SEEDS = ["a cat", "a large red dog"], [11, 12]
SOLVERS = ["DDIMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler"]
SUBJECTS = [*(("sd15", solver) for solver in SOLVERS), ("sd15_img2img", None), ("sd3", None), ("flux", None), ("wan", None)]


class Subject:
    """A pipeline with a LoRA that does something, on a solver of choice, and the same pipeline untouched."""

    def __init__(self, family, solver=None):
        self.family = FAMILIES[family]
        pipeline, self.stock = self.family.build(), self.family.build()
        for p in (pipeline, self.stock) if solver else ():
            p.scheduler = getattr(diffusers, solver).from_config(p.scheduler.config)
        for module in self.stock.components.values():
            if isinstance(module, torch.nn.Module):
                module.requires_grad_(False)  # as the policy's: on some processors kernels are chosen, and round, by that flag
        self.policy = Policy(pipeline, **self.family.call)
        self.parameters = self.policy.add_lora(rank=2)
        torch.manual_seed(1)
        for module in self.policy.denoisers.values():
            for name, parameter in module.named_parameters():
                if ".lora_B." in name:
                    parameter.data.normal_(std=0.3)
        self.condition = self.policy.condition(PROMPTS, seeds=SEEDS)

    def rollout(self, grad_steps, **options):
        return differentiable_rollout(self.policy, self.condition, grad_steps=grad_steps, **options)

    def steps(self):
        return count_steps(self.policy, self.condition)

    def gradient(self, loss, **options):
        found = torch.autograd.grad(loss, self.parameters, allow_unused=True, **options)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(self.parameters, found)])


@functools.cache
def subject(family, solver=None) -> Subject:
    return Subject(family, solver)


@pytest.fixture
def sd3():
    """One of its own, to be damaged."""
    return Subject("sd3")


def weights(images):
    return torch.randn(images.shape, generator=torch.Generator().manual_seed(3))


def score(images):
    """A reward (B,) that looks at every pixel."""
    return (images * weights(images)).flatten(1).sum(1)


def brightness(images):
    return images.flatten(1).mean(1)


def close(actual, expected, tolerance=1e-5):
    assert expected.norm() > 0
    assert float((actual - expected).detach().norm() / expected.detach().norm()) <= tolerance
