"""Whole pipelines whose samplers have noise of their own: distilled few-step models, learned variances, continuous time, tokens that are held."""

from __future__ import annotations

import functools
import importlib

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler, TCDScheduler
from tiny_pipelines import FAMILIES

import diffusers_align
from diffusers_align import Policy
from diffusers_align.algorithms.ddpo import ddpo_loss
from diffusers_align.algorithms.flow_grpo import flow_grpo_loss, gaussian_kl
from diffusers_align.forward_process import ForwardProcess
from diffusers_align.gradients.rollout import differentiable_rollout
from diffusers_align.pipelines import BestOfNPipeline, ParticleSteeringPipeline
from diffusers_align.schedulers.twin import SDE_FIELDS
from tests.families.case import Case

PROMPTS, SEEDS = ["a cat", "a large red dog"], [11, 12]
CASES = {
    "LatentConsistencyModelPipeline": "latent_transformers", "SanaSprintPipeline": "sana", "AnyFlowPipeline": "wan", "IFPipeline": "pixels",
    "StableCascadePriorPipeline": "wuerstchen", "LTXConditionPipeline": "ltx",
}  # fmt: skip
CONSISTENCY = ("lcm", "lcm in one step", "tcd", "LatentConsistencyModelPipeline", "SanaSprintPipeline")


def with_scheduler(scheduler):
    pipeline = FAMILIES["sd15"].build()
    pipeline.scheduler = scheduler()
    return pipeline


def case(name: str) -> Case:
    call = {"height": 16, "width": 16, "guidance_scale": 3.0}
    if name in ("lcm", "tcd"):
        return Case(lambda: with_scheduler({"lcm": LCMScheduler, "tcd": TCDScheduler}[name]), call | {"num_inference_steps": 4})
    if name == "lcm in one step":
        return Case(lambda: with_scheduler(LCMScheduler), call | {"num_inference_steps": 1})
    module = f"tests.families.cases.{CASES[name]}"
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"no case of {name} yet")
    return importlib.import_module(module).CASES[name][0]


@pytest.fixture(scope="module", params=["lcm", "tcd", "lcm in one step", *CASES])
def subject(request):
    torch.set_num_threads(1)
    made = case(request.param)
    policy = Policy(made.build(), **made.call)
    policy.pipeline.set_progress_bar_config(disable=True)
    trajectory = policy.rollout(PROMPTS, seeds=SEEDS)
    policy.add_lora(rank=2)
    return request.param, policy, trajectory, made


def relative_error(actual, expected):
    return float((actual - expected).abs().max() / expected.abs().max())


def brightness(images, prompts, **columns):
    return images.flatten(1).mean(1)


def test_replays_are_the_roll_out_bit_for_bit_with_gradients(subject):
    _, policy, trajectory, _ = subject
    assert trajectory.final.isfinite().all()
    found = {}

    def on_step(k, kernel):
        found[k] = kernel.log_prob(trajectory.actions[:, k])
        found[k].sum().backward()

    policy.replay(trajectory, on_step)
    assert sorted(found) == trajectory.noisy_steps
    for k, log_prob in found.items():
        assert torch.equal(log_prob.detach(), trajectory.log_probs[:, k]), f"step {k}"
        assert torch.equal(policy.transition(trajectory, k).log_prob(trajectory.actions[:, k]).detach(), trajectory.log_probs[:, k])
    assert not found or all(p.grad is not None and p.grad.isfinite().all() for p in policy.trainable_parameters())


def test_the_same_seeds_give_the_same_samples_and_others_do_not(subject):
    _, policy, trajectory, _ = subject
    assert torch.equal(policy.rollout(PROMPTS, seeds=SEEDS).samples, trajectory.samples)
    assert not torch.equal(policy.rollout(PROMPTS, seeds=[13, 14]).final, trajectory.final)


def test_deterministic_is_the_stock_sampler_with_its_noise_and_no_log_probability(subject):
    name, policy, trajectory, made = subject
    walked = policy.rollout(PROMPTS, seeds=SEEDS, deterministic=True)
    assert walked.noisy_steps == [] and torch.equal(walked.samples, policy.rollout(PROMPTS, seeds=SEEDS, deterministic=True).samples)
    assert not trajectory.noisy_steps or not torch.equal(walked.final, trajectory.final)
    stock, ends = made.build(), []
    stock.set_progress_bar_config(disable=True)
    stock_step = type(stock.scheduler).step

    def step(*args, **kwargs):
        output = stock_step(stock.scheduler, *args, **kwargs)
        ends[:] = [output[0]]
        return output

    stock.scheduler.step = functools.wraps(stock_step.__get__(stock.scheduler))(step)  # pipelines look at its signature
    stock(prompt=PROMPTS, generator=[torch.Generator().manual_seed(seed) for seed in SEEDS], **made.call)
    assert relative_error(walked.final, ends[0]) <= 1e-4, name


def test_completions_are_fixed_by_the_seeds(subject):
    _, policy, trajectory, _ = subject
    k = trajectory.num_steps // 2
    first, again = (policy.complete(trajectory, k) for _ in range(2))
    assert torch.equal(first, again) and first.isfinite().all()


def test_an_update_of_ddpo_and_of_grpo_moves_the_weights_along_the_advantage(subject):
    _, policy, trajectory, _ = subject
    if not trajectory.noisy_steps:
        pytest.skip("one step without noise has nothing to reinforce: the test of gradients is for it")
    advantage, per_dim = torch.tensor([1.0, -1.0]), trajectory.final[0].numel()
    losses = {
        "ddpo": lambda new, old: ddpo_loss(new, old, advantage, per_dim=per_dim, clip_range=1e-4),
        "grpo": lambda new, old: flow_grpo_loss(new, old, advantage, per_dim=per_dim, clip_range=1e-4),
    }
    for loss in losses.values():
        policy.zero_grad() if hasattr(policy, "zero_grad") else [setattr(p, "grad", None) for p in policy.trainable_parameters()]
        seen = []

        def on_step(k, kernel, loss=loss, seen=seen):
            new, old = kernel.log_prob(trajectory.actions[:, k]), trajectory.log_probs[:, k]
            assert torch.equal(new.detach(), old)  # so the ratio is exactly 1
            seen.append(loss(new, old))
            (seen[-1].mean() + gaussian_kl(kernel.mean, kernel.mean.detach(), kernel.std.detach()).mean()).backward()

        policy.replay(trajectory, on_step)
        moved = [p for p in policy.trainable_parameters() if p.grad is not None and bool(p.grad.any())]
        assert len(seen) == len(trajectory.noisy_steps) and moved and all(p.grad.isfinite().all() for p in moved)


@pytest.mark.parametrize("walk", ["last step", "first step, jumped to the end"])
def test_pixels_have_a_gradient(subject, walk):
    _, policy, trajectory, _ = subject
    condition, last = policy.condition(PROMPTS, seeds=SEEDS), trajectory.num_steps - 1
    options = {"grad_steps": [last]} if walk == "last step" else {"grad_steps": [0], "stop_step": 0}
    rollout = differentiable_rollout(policy, condition, **options)
    gradients = torch.autograd.grad(rollout.latents.square().sum(), policy.trainable_parameters(), allow_unused=True)
    assert rollout.latents.isfinite().all()
    assert any(g is not None and bool(g.any()) for g in gradients)


def test_images_are_those_of_the_stock_call(subject):
    """What a pipeline decodes is what the trajectory ends with, also where it takes that from beside the state."""
    name, policy, trajectory, _ = subject
    if name == "StableCascadePriorPipeline":
        with pytest.raises(ValueError, match="makes no pictures, but .* from which another pipeline makes some"):
            policy.decode(trajectory.final, trajectory.condition)
        return
    images = policy.decode(trajectory.final, trajectory.condition)
    other = policy.decode(trajectory.states[:, 0], trajectory.condition)
    assert images.shape[0] == 2 and not torch.equal(images, other)
    if name in CONSISTENCY:
        swapped = policy.decode(trajectory.final.flip(0), trajectory.condition)
        torch.testing.assert_close(swapped, images.flip(0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("pipeline", [BestOfNPipeline, ParticleSteeringPipeline])
def test_the_best_of_several_and_particles(subject, pipeline):
    name, policy, trajectory, made = subject
    if not trajectory.noisy_steps and pipeline is ParticleSteeringPipeline:
        pytest.skip("particles need a step with noise")
    number = {"num_candidates": 3} if pipeline is BestOfNPipeline else {"num_particles": 3}
    output = pipeline(made.build())(PROMPTS[0], reward=brightness, generator=torch.Generator().manual_seed(0), **number, **made.call)
    assert output[0] is not None


def test_losses_on_noised_samples_are_refused_where_they_mean_nothing(subject):
    name, policy, trajectory, _ = subject
    jumps = name in (*CONSISTENCY, "AnyFlowPipeline")
    if jumps:
        with pytest.raises(TypeError, match="jumps along its own trajectories.*use methods that roll out"):
            ForwardProcess(policy.scheduler)
    elif name != "LTXConditionPipeline":
        forward = ForwardProcess(policy.scheduler)
        t = forward.sample_timesteps(2, torch.Generator().manual_seed(0))
        noise = torch.randn(trajectory.final.shape, generator=torch.Generator().manual_seed(1))
        noised = forward.add_noise(trajectory.final, noise, t)
        with torch.no_grad():
            output = policy.predict(noised, t, trajectory.condition)
        assert output.shape == trajectory.final.shape == forward.target(trajectory.final, noise, t).shape
        torch.testing.assert_close(forward.to_x0(forward.target(trajectory.final, noise, t), noised, t), trajectory.final, rtol=0, atol=2e-2)


def test_a_consistency_output_can_still_be_asked_for(subject):
    name, policy, trajectory, _ = subject
    if name not in CONSISTENCY or trajectory.num_steps < 2:
        pytest.skip("of consistency samplers with two steps or more")
    k = trajectory.noisy_steps[-1]
    times = trajectory.timesteps[k].expand(2)
    with torch.no_grad():
        output = policy.predict(trajectory.states[:, k], times, trajectory.condition, guidance=True)
    again = policy.rollout(trajectory.condition)
    assert output.shape == trajectory.final.shape and torch.equal(again.samples, trajectory.samples)


def test_held_tokens_stay_and_count_for_nothing():
    made = case("LTXConditionPipeline")
    policy = Policy(made.build(), **made.call)
    trajectory = policy.rollout(PROMPTS, seeds=SEEDS)
    kernel = policy.transition(trajectory, 0)
    drawn = (kernel.std > 0).expand(kernel.mean.shape)
    assert 0 < int(drawn.sum()) < drawn.numel()
    assert torch.equal(trajectory.actions[:, 0][~drawn], trajectory.states[:, 0][~drawn])
    moved = trajectory.actions[:, 0].clone()
    moved[~drawn] += 1.0
    assert torch.equal(kernel.log_prob(moved), kernel.log_prob(trajectory.actions[:, 0]))


@pytest.mark.parametrize("name", ["lcm", "tcd"])
def test_a_pipeline_with_a_twin_survives_saving_and_loading(name, tmp_path):
    policy = Policy(case(name).build())
    stock = policy.pipeline.scheduler
    for scheduler in (stock, policy.scheduler):
        policy.pipeline.scheduler = scheduler
        policy.pipeline.save_pretrained(tmp_path)
        assert type(DiffusionPipeline.from_pretrained(tmp_path).scheduler) is type(scheduler)
    assert type(DiffusionPipeline.from_pretrained(tmp_path).scheduler) is type(policy.scheduler)


def test_every_twin_is_found_where_diffusers_looks():
    for name in SDE_FIELDS:
        if name != "FlowMapSDEScheduler" or hasattr(diffusers, "FlowMapEulerDiscreteScheduler"):
            assert getattr(diffusers_align, name).__name__ == name
