"""Renoised samples: of the last step, aligned, recomputed."""

from types import SimpleNamespace

import diffusers
import pytest
import torch
from reward_gradients import brightness, conditioned, tiny
from tiny_pipelines import FAMILIES

from diffusers_align import Policy
from diffusers_align.data.prompts import Prompt
from diffusers_align.forward_process import ForwardProcess
from diffusers_align.gradients.rollout import differentiable_rollout
from diffusers_align.training.gradient import renoised
from diffusers_align.training.gradient.bound_rewards import BoundReward
from diffusers_align.training.gradient.loop import Batch


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_renoised_images_are_those_of_the_last_step(family, monkeypatch):
    """Noised by what the last step denoised, a sample is its own image."""
    policy = tiny(family)
    rollout = differentiable_rollout(policy, conditioned(policy), grad_steps=[3], stop_step=3)
    forward, t = ForwardProcess(policy.scheduler), torch.full((2,), rollout.timesteps[3])
    alpha, sigma = (level(t).reshape(-1, 1, 1, 1) for level in (forward.alpha, forward.sigma))
    other = next(renoised.renoised_images(policy, rollout, 1))
    monkeypatch.setattr(renoised, "drawn_noise", lambda rollout, name: (rollout.states[3] - alpha * rollout.latents.detach()) / sigma)
    images = next(renoised.renoised_images(policy, rollout, 1))
    torch.testing.assert_close(images, rollout.images, rtol=0, atol=1e-3)
    assert not torch.allclose(other, images, atol=1e-2) and other.requires_grad


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_a_perfect_model_is_aligned(family, monkeypatch):
    """It gives the sample back on both branches."""
    policy = tiny(family)
    rollout = differentiable_rollout(policy, conditioned(policy), grad_steps=[])
    steps = renoised.alignable_steps(policy, rollout)
    assert steps == ([1, 2, 3] if family == "sd15" else [2, 3])
    forward, noise = ForwardProcess(policy.scheduler), renoised.drawn_noise(rollout, "aligned")
    denoised, inverted = renoised.aligned_images(policy, rollout, 3)
    assert not torch.allclose(denoised, rollout.images, atol=1e-2) and not torch.equal(denoised, inverted)
    monkeypatch.setattr(policy, "predict", lambda x, t, condition, guidance: forward.target(rollout.latents, noise, t))
    for images in renoised.aligned_images(policy, rollout, 3):
        torch.testing.assert_close(images, rollout.images, rtol=0, atol=1e-4)


@pytest.mark.parametrize("solver", ["EulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_solvers_between_the_rows_of_the_noise_table_are_renoised_at_rows(solver):
    pipeline = FAMILIES["sd15"].build()
    pipeline.scheduler = getattr(diffusers, solver).from_config(pipeline.scheduler.config, timestep_spacing="linspace")
    policy = Policy(pipeline, **{**FAMILIES["sd15"].call, "num_inference_steps": 5})
    policy.add_lora(rank=2)
    rollout = differentiable_rollout(policy, conditioned(policy), grad_steps=[], decode=False)
    assert any(t != round(t) for t in rollout.timesteps)
    assert renoised.noising_times(policy, rollout).tolist() == [999, 749, 500, 250, 0]
    for k in renoised.alignable_steps(policy, rollout):
        assert all(images.requires_grad for images in renoised.aligned_images(policy, rollout, k))
    assert next(renoised.renoised_images(policy, rollout, 1)).requires_grad


@pytest.mark.parametrize("images_of", [renoised.renoised_images, renoised.aligned_images])
def test_renoised_samples_are_recomputed_on_the_way_back_or_not(images_of):
    """To the same gradient."""
    policy, calls, gradients = tiny("sd3"), [], []
    rollout = differentiable_rollout(policy, conditioned(policy), grad_steps=[], decode=False)
    modules = {policy.pipeline.transformer.pos_embed, policy.pipeline.vae.decoder}
    handles = [module.register_forward_pre_hook(lambda module, _: calls.append(module)) for module in modules]
    for again in (False, True):
        images = list(images_of(policy, rollout, 2, checkpoint=again, decode_checkpoint=again))
        calls.clear()
        found = torch.autograd.grad(sum(image.sum() for image in images), policy.trainable_parameters(), allow_unused=True)
        gradients.append(torch.cat([g.flatten() for g in found if g is not None]))
        assert set(calls) == (modules if again else set())
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(*gradients)


def test_relative_rewards_read_the_words():
    def lengths(images, prompts, **columns):
        return images.flatten(1).mean(1) * 0 + torch.tensor([float(len(prompt)) for prompt in prompts])

    asked = [Prompt("cat"), Prompt("mouse")]
    said = []
    run = SimpleNamespace(explain_once=said.append)
    found = renoised.relative_rewards(run, Batch(None, asked, BoundReward(lengths, asked)), torch.zeros(2, 3, 4, 4), ("red", "a"), 0.5)
    assert found.tolist() == [1.5 * 7 - 5, 1.5 * 9 - 7]
    assert not said
    renoised.relative_rewards(run, Batch(None, asked, BoundReward(brightness, asked)), torch.ones(2, 3, 4, 4), ("red", "a"), 0.5)
    assert len(said) == 1 and "the same under 'red' and 'a'" in said[0]
