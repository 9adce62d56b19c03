"""What switches guidance off."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.guiders import AdaptiveProjectedMixGuidance

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


class Guided(StableDiffusionPipeline):
    """Its guidance is a component."""

    def __init__(self, vae, text_encoder, tokenizer, unet, scheduler, safety_checker, feature_extractor, image_encoder, guider):
        super().__init__(vae, text_encoder, tokenizer, unet, scheduler, safety_checker, feature_extractor, image_encoder, requires_safety_checker=False)
        self.register_modules(guider=guider)

    def __call__(self, prompt, generator=None, output_type="latent", **kwargs):
        scale = 3.0 if self.guider._enabled else 1.0
        return super().__call__(prompt, generator=generator, output_type=output_type, guidance_scale=scale, height=16, width=16, num_inference_steps=4)


def test_a_guider_is_disabled_for_a_prediction_and_as_before_afterwards():
    policy, call = a_policy("StableDiffusionPipeline"), CASES["StableDiffusionPipeline"][0].call
    parts = {**policy.pipeline.components, "scheduler": policy.stock_scheduler}
    guided = Guided(**parts, guider=AdaptiveProjectedMixGuidance())
    guided.set_progress_bar_config(disable=True)
    plain = Policy(StableDiffusionPipeline(**parts, requires_safety_checker=False), **{**call, "guidance_scale": 1.0})
    policy = Policy(guided)
    trajectory = policy.rollout(PROMPTS, seeds=SEEDS)
    asked = (trajectory.states[:, 1], trajectory.timesteps[[1, 1]])
    with torch.no_grad():
        unguided = policy.predict(*asked, trajectory.condition)
        assert torch.equal(unguided, plain.predict(*asked, plain.condition(PROMPTS, seeds=SEEDS)))
        assert not torch.allclose(policy.predict(*asked, trajectory.condition, guidance=True), unguided, rtol=1e-2)
    assert guided.guider._enabled
    with pytest.raises(ValueError, match="its guider does"):
        policy.guidance_off(trajectory.condition)
