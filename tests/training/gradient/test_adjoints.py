"""Adjoints along a policy's own chain: against autograd, and chains that cannot be matched."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from tiny_pipelines import FAMILIES

from diffusers_align import Policy
from diffusers_align.algorithms.adjoint_matching import adjoint_matching_loss, pulled_back
from diffusers_align.schedulers import sde_twin
from diffusers_align.training.gradient.adjoints import check_chain, kernel_at, make_memoryless, matching_targets, reward_gradient, smoothed

DATA_MEAN, DATA_STD, SCALE, SLOPE = 0.7, 0.6, 2.0, 0.5  # data N(m, s^2), lambda, r(x) = c x


# --- stock pipelines -----------------------------------------------------------------------------------------------------


PROMPTS, SEEDS = ["a cat", "two dogs"], [3, 4]


def a_policy(name, **call):
    policy = Policy(FAMILIES[name].build(), **{**FAMILIES[name].call, **call})
    make_memoryless(policy)
    policy.add_lora(rank=2)
    return policy


def disturb(policy):
    """Give the LoRA something to say."""
    with torch.no_grad():
        for i, parameter in enumerate(policy.trainable_parameters()):
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(i))


def redness(policy, condition=None):
    return lambda latents: reward_gradient(policy, latents, condition, lambda images: images[:, 0].flatten(1).mean(1))


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
def test_the_pulled_back_adjoint_is_the_derivative_of_the_pipelines_own_step(name):
    policy = a_policy(name)
    trajectory = policy.rollout(PROMPTS, seeds=SEEDS)
    check_chain(trajectory)
    k, generator = 2, torch.Generator().manual_seed(0)
    x = trajectory.actions[:, k - 1]
    direction, adjoint = (torch.randn(x.shape, generator=generator) for _ in range(2))
    pulled = pulled_back(lambda state: kernel_at(policy, trajectory, k, state).mean, x, adjoint)
    width = 4e-4 / float(direction.abs().max())
    with torch.no_grad():
        ahead, behind = (kernel_at(policy, trajectory, k, x + sign * width * direction).mean.double() for sign in (1, -1))
    expected = ((ahead - behind) / (2 * width) * adjoint).flatten(1).sum(1)
    torch.testing.assert_close((pulled * direction).flatten(1).sum(1).double(), expected, rtol=1e-2, atol=0.02 * float(expected.abs().max()))
    # the derivative is more than the solver's own factor
    assert not torch.allclose(pulled / adjoint, (pulled / adjoint).median(), rtol=1e-2)


def test_targets_are_those_of_the_pretrained_chain_by_autograd():
    """SD3's own transformer in a loop of its own, without the driver: gradient of the whole base chain at the recorded noise."""
    policy = a_policy("sd3", guidance_scale=1.0)
    disturb(policy)
    trajectory = policy.rollout(PROMPTS, seeds=SEEDS)
    steps, pipe, scheduler = [0, 1, 2], policy.pipeline, policy.scheduler
    target = matching_targets(policy, trajectory, steps, redness(policy), SCALE)

    with policy.reference(), torch.no_grad():
        text, _, pooled, _ = pipe.encode_prompt(PROMPTS, PROMPTS, PROMPTS, do_classifier_free_guidance=False, max_sequence_length=32)
    start = trajectory.actions[:, 0].clone().requires_grad_()
    x, means = start, {}
    with policy.reference():
        for k in range(1, 4):
            t = scheduler.timesteps[k]
            velocity = pipe.transformer(x, timestep=t.expand(2), encoder_hidden_states=text, pooled_projections=pooled, return_dict=False)[0]
            means[k] = scheduler.transition(velocity, t, x).mean
            x = means[k] + (trajectory.actions[:, k] - means[k].detach() if k < 3 else 0)
        reward = policy.decode(x)[:, 0].flatten(1).mean(1)
    (gradient,) = torch.autograd.grad(reward.sum(), start)
    assert gradient.abs().max() > 0
    torch.testing.assert_close(target.adjoints[0], -SCALE * gradient, rtol=1e-4, atol=1e-4 * SCALE * float(gradient.abs().max()))
    torch.testing.assert_close(target.base_means[1], means[1].detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(target.reward.rewards, reward.detach(), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(policy.transitions(trajectory, [1])[1].mean, means[1], rtol=1e-3), "the fine-tuned model is another"


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_a_constant_reward_asks_for_nothing(name):
    policy = a_policy(name)
    trajectory, parameters = policy.rollout(PROMPTS, seeds=SEEDS), policy.trainable_parameters()
    before = [p.detach().clone() for p in parameters]

    def step(gradient_of):
        target, losses = matching_targets(policy, trajectory, [0, 1, 2], gradient_of, SCALE), []

        def on_step(k, transition):
            losses.append(adjoint_matching_loss(transition.mean, target.base_means[k], transition.std, target.adjoints[k]))
            losses[-1].sum().backward()

        optimizer = torch.optim.AdamW(parameters, 1e-2, weight_decay=0.0)
        policy.replay(trajectory, on_step, [0, 1, 2])
        optimizer.step()
        return torch.stack(losses)

    assert step(lambda latents: reward_gradient(policy, latents, None, lambda images: 1 + 0 * images.flatten(1).sum(1))).abs().max() == 0
    assert all(torch.equal(p, q) for p, q in zip(parameters, before))
    assert step(redness(policy)).min() > 0
    assert any(not torch.equal(p, q) for p, q in zip(parameters, before))


def test_guided_trajectories_are_matched_without_guidance():
    policy = a_policy("sd15")
    guided = policy.rollout(PROMPTS, seeds=SEEDS)
    off = policy.guidance_off(guided.condition)
    assert off == {"guidance_scale": 1.0}
    condition = replace(guided.condition, kwargs=guided.condition.kwargs | off)
    target = matching_targets(policy, guided, [0, 1, 2], redness(policy), SCALE, condition)
    plain = matching_targets(policy, guided, [0, 1, 2], redness(policy), SCALE)
    expected = policy.transitions(replace(guided, condition=condition), [1])[1].mean
    assert torch.equal(target.base_means[1], expected)
    assert not torch.allclose(target.adjoints[0], plain.adjoints[0], rtol=1e-2)


def test_a_sample_without_a_score_has_no_gradient():
    policy = a_policy("sd15")
    latents = policy.rollout(PROMPTS, seeds=SEEDS).final

    def second_alone(images):
        return torch.stack([images[0].sum() * float("nan"), images[1].mean()])

    found = reward_gradient(policy, latents, None, second_alone)
    assert found.rewards[0].isnan() and found.gradient[0].abs().max() == 0 and found.gradient[1].abs().max() > 0
    with pytest.raises(ValueError, match="no gradient"):
        reward_gradient(policy, latents, None, lambda images: images.detach().flatten(1).mean(1))


def test_smoothing_of_a_policys_gradient():
    policy = a_policy("sd15")
    trajectory = policy.rollout(PROMPTS, seeds=SEEDS)
    arguments = policy, trajectory.final, trajectory.condition, lambda images: images[:, 0].flatten(1).mean(1)
    plain, still, moved = reward_gradient(*arguments), *(smoothed(*arguments, copies=3, noise_std=std, quantile=1.0) for std in (0.0, 0.5))
    torch.testing.assert_close(still.gradient, plain.gradient, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(still.rewards, plain.rewards)
    assert not torch.allclose(moved.gradient, plain.gradient, rtol=1e-2)
    assert torch.equal(moved.gradient, smoothed(*arguments, copies=3, noise_std=0.5, quantile=1.0).gradient)


def test_chains_that_cannot_be_matched():
    policy = a_policy("sd3")
    policy.scheduler.register_to_config(sde_window=[0, 2])
    trajectory = policy.rollout(PROMPTS, seeds=SEEDS)
    with pytest.raises(ValueError, match=r"every step but the last; steps \[2\] of 4"):
        check_chain(trajectory)
    with pytest.raises(ValueError, match="several modalities"):
        check_chain(replace(trajectory, children=(trajectory,)))
    clipping = Policy(FAMILIES["sd15"].build(), sde_twin(DDIMScheduler(clip_sample=True)))
    with pytest.raises(ValueError, match="clip_sample=False"):
        make_memoryless(clipping)
    learned = Policy(FAMILIES["sd15"].build(), sde_twin(DDPMScheduler(clip_sample=False, variance_type="learned_range")))
    with pytest.raises(ValueError, match="learns the variance of its steps.*train_draft.py"):
        make_memoryless(learned)
    windowed = Policy(FAMILIES["sd15"].build(), sde_twin(DDIMScheduler(clip_sample=False), eta=0.5, sde_window=(0, 2)))
    make_memoryless(windowed)
    assert (windowed.scheduler.config.eta, windowed.scheduler.config.sde_window) == (1.0, None), "noise in every step"
