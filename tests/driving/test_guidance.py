"""What switches guidance off."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

from diffusers_align import Policy
from tests.families.cases import CASES

PROMPTS, SEEDS = ["a cat", "a dog"], [1, 2]


def a_policy(name, **call):
    case = CASES[name][0]
    return Policy(case.build(), **{**case.call, **call})


def test_scales_are_switched_off_together_where_one_alone_leaves_a_row():
    """Without guidance, perturbed attention's pipeline is Stable Diffusion's with the same parts."""
    policy = a_policy("StableDiffusionPAGPipeline")
    trajectory = policy.rollout(PROMPTS, seeds=SEEDS)
    assert policy.guidance_off(trajectory.condition) == {"guidance_scale": 1.0, "pag_scale": 0.0}
    parts = {**policy.pipeline.components, "scheduler": policy.stock_scheduler}
    plain = Policy(StableDiffusionPipeline(**parts, requires_safety_checker=False), **{**CASES["StableDiffusionPipeline"][0].call, "guidance_scale": 1.0})
    asked = (trajectory.states[:, 1], trajectory.timesteps[[1, 2]])
    with torch.no_grad():
        expected = plain.predict(*asked, plain.condition(PROMPTS, seeds=SEEDS))
        assert torch.equal(policy.predict(*asked, trajectory.condition), expected)
        assert not torch.allclose(policy.predict(*asked, trajectory.condition, guidance=True), expected, rtol=1e-2)


def test_a_network_that_is_asked_twice_in_any_case_is_unguided_where_it_is_asked_least():
    policy = a_policy("StableDiffusionGLIGENTextImagePipeline")
    assert policy.guidance_off(policy.condition(PROMPTS, seeds=SEEDS)) == {"guidance_scale": 1.0}


def test_what_every_trial_raises_is_said(monkeypatch):
    policy = a_policy("StableDiffusionPipeline")

    def forward(*args, **kwargs):
        raise ValueError("no such channels")

    monkeypatch.setattr(policy.pipeline.unet, "forward", forward)
    with pytest.raises(ValueError, match="no such channels"):
        policy.guidance_off(policy.condition(PROMPTS, seeds=SEEDS))
