"""Stock pipelines whose schedulers walk in sigma space: asked as in the stock call, replayed exactly, aligned online and offline."""

import math

import diffusers
import pytest
import torch
from sigma_pipelines import PIPELINES, sdxl

from diffusers_align import Policy, SigmaSDEScheduler
from diffusers_align.algorithms.ddpo import ddpo_loss
from diffusers_align.algorithms.diffusion_dpo import diffusion_dpo_loss
from diffusers_align.driving.stock import stock_solver
from diffusers_align.forward_process import ForwardProcess
from diffusers_align.pipelines import RewardGuidedPipeline
from diffusers_align.rl.matching import matching_error

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:The following part of your input was truncated")
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def made(name: str, dtype: torch.dtype = torch.float32) -> Policy:
    build, _, call, _ = PIPELINES[name]
    policy = Policy(build().to(dtype), **call)
    assert type(policy.scheduler) is SigmaSDEScheduler
    return policy


def condition_of(policy: Policy, name: str, seeds: list[int]):
    _, prompts, _, per_sample = PIPELINES[name]
    return policy.condition(prompts, seeds=seeds, **({"per_sample": per_sample} if per_sample else {}))


@torch.no_grad()
def walked(policy: Policy, condition, on_step) -> list[torch.Tensor]:
    """One pass, and everything that the denoiser was given in it."""
    given, (denoiser,) = [], policy.denoisers.values()
    handle = denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: given.extend(x.clone() for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)), with_kwargs=True
    )
    with policy.noise(condition, deterministic=True):
        policy.drive(condition, on_step)
    handle.remove()
    return given


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PIPELINES)
def test_without_noise_all_is_as_in_the_stock_call(name, dtype):
    """The denoiser is given the same, bit for bit: times, scaled states and conditions; and the last state is the same."""
    policy = made(name, dtype)
    condition, ends = condition_of(policy, name, [1, 2]), []
    mine = walked(policy, condition, lambda step: ends.append(step.run().prev_sample))
    with stock_solver(policy):
        stock = walked(policy, condition, lambda step: ends.append(step.run().prev_sample))
    assert len(mine) == len(stock) > 8 and all(torch.equal(a, b) for a, b in zip(mine, stock))
    assert len(ends) == 8 and torch.equal(ends[3], ends[7])


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PIPELINES)
def test_a_roll_out_is_replayed_to_the_bit(name, dtype):
    policy = made(name, dtype)
    trajectory = policy.rollout(condition_of(policy, name, [1, 2]))
    assert trajectory.noisy_steps == [0, 1, 2] and trajectory.states.isfinite().all()
    kernels = policy.transitions(trajectory)
    for k, kernel in kernels.items():
        assert torch.equal(kernel.log_prob(trajectory.actions[:, k]), trajectory.log_probs[:, k]), f"step {k}"
    assert torch.equal(policy.transition(trajectory, 2).mean, kernels[2].mean), "a step by itself"
    assert torch.equal(policy.complete(trajectory, 3), trajectory.final)
    assert policy.decode(trajectory.final, trajectory.condition).isfinite().all()


@pytest.mark.parametrize("name", PIPELINES)
def test_predictions_imply_the_clean_sample_that_the_step_sees(name):
    """At the roll-out's own states, with guidance; and at times of each sample's own as one by one."""
    policy = made(name)
    trajectory, cleans = policy.rollout(condition_of(policy, name, [1, 2])), []
    condition, forward = trajectory.condition, ForwardProcess(policy.scheduler)
    with policy.noise(condition, deterministic=False), torch.no_grad():
        policy.drive(condition, lambda step: cleans.append(step.run().pred_original_sample))
    for k in (0, 2):
        state, times = trajectory.states[:, k], trajectory.timesteps[k].expand(2)
        with torch.no_grad():
            clean = forward.to_x0(policy.predict(state, times, condition, guidance=True), state, times)
        torch.testing.assert_close(clean, cleans[k], rtol=1e-4, atol=1e-4 * float(cleans[k].abs().max()))
    states, times = torch.stack([trajectory.states[0, 1], trajectory.states[1, 2]]), trajectory.timesteps[1:3]
    with torch.no_grad():
        together = policy.predict(states, times, condition)
        for i in range(2):
            alone = policy.predict(states[i : i + 1], times[i : i + 1], condition.select([i]))
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-3, atol=1e-4)
    low, high = policy.scheduler.time_range
    with pytest.raises(ValueError, match=rf"timesteps are numbers from {low:g} to {high:g}, in the scheduler's units"):
        policy.predict(states, times + 2 * (high - low), condition)


@pytest.mark.parametrize("scheduler", [diffusers.DPMSolverMultistepScheduler, diffusers.UniPCMultistepScheduler, diffusers.HeunDiscreteScheduler])
def test_other_solvers_with_karras_levels(scheduler):
    """The first step has the stock state, the stock time and the stock scale, whichever solver it is."""
    pipeline = sdxl(scheduler(**BETAS, use_karras_sigmas=True))
    policy = Policy(pipeline, **PIPELINES["SDXL"][2])
    condition = condition_of(policy, "SDXL", [1, 2])
    mine = walked(policy, condition, lambda step: None)
    with stock_solver(policy):
        stock = walked(policy, condition, lambda step: None)
    assert all(torch.equal(a, b) for a, b in zip(mine[:3], stock[:3]))
    trajectory = policy.rollout(condition)
    for k, kernel in policy.transitions(trajectory).items():
        assert torch.equal(kernel.log_prob(trajectory.actions[:, k]), trajectory.log_probs[:, k])


@pytest.mark.parametrize("name", PIPELINES)
def test_gradients_of_pixels_reach_the_last_state(name):
    """Also where the pipeline would hand its pictures to a guardrail, as NumPy arrays."""
    policy = made(name)
    condition = condition_of(policy, name, [1, 2])
    final = policy.rollout(condition).final.requires_grad_()
    policy.decode(final, condition).mean().backward()
    assert final.grad.isfinite().all() and (final.grad.flatten(1).norm(dim=1) > 0).all()
    assert getattr(policy.pipeline, "safety_checker", None) is policy.pipeline.components.get("safety_checker")


# --- alignment -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SDXL", "SVD", "Cosmos"])
def test_a_policy_gradient_update(name):
    """Ratios are 1 before the update; after it what was better has become likelier than what was worse."""
    policy = made(name)
    parameters = policy.add_lora(rank=2)
    trajectory = policy.rollout(condition_of(policy, name, [1, 2]))
    reward = policy.decode(trajectory.final, trajectory.condition).flatten(1).mean(1)
    advantage = (reward - reward.mean()).sign().double()
    ratios = []

    def on_step(k, kernel):
        log_prob = kernel.log_prob(trajectory.actions[:, k])
        ratios.append((log_prob - trajectory.log_probs[:, k]).detach())
        ddpo_loss(log_prob, trajectory.log_probs[:, k], advantage, per_dim=1, clip_range=0.2).mean().backward()

    policy.replay(trajectory, on_step)
    assert torch.stack(ratios).abs().max() == 0
    assert all(p.grad is not None for p in parameters) and any(bool(p.grad.any()) for p in parameters)
    with torch.no_grad():
        for p in parameters:
            p -= 1e-4 * p.grad / torch.stack([q.grad.norm() for q in parameters]).norm()
    gained = sum((kernel.log_prob(trajectory.actions[:, k]) - trajectory.log_probs[:, k]) for k, kernel in policy.transitions(trajectory).items())
    assert (advantage * gained).sum() > 0


@pytest.mark.parametrize("name", ["SDXL", "SVD", "Cosmos"])
def test_a_preference_update(name):
    """DPO on one pair at continuous times: the loss begins at log 2, and a step of descent lowers it."""
    policy = made(name)
    parameters, forward = policy.add_lora(rank=2), ForwardProcess(policy.scheduler)
    condition = condition_of(policy, name, [1, 2])
    videos = policy.decode(policy.rollout(condition).final, condition)
    with torch.no_grad():
        clean = policy.encode(videos, condition)
    t = forward.sample_timesteps(1, torch.Generator().manual_seed(0)).expand(2)
    noise = torch.randn(clean.shape[1:], generator=torch.Generator().manual_seed(1)).expand_as(clean)
    x_t, target = forward.add_noise(clean, noise, t), forward.target(clean, noise, t)

    def errors():
        return matching_error(policy.predict(x_t, t, condition), target)

    with torch.no_grad(), policy.reference():
        ref = errors()
    losses = []
    for _ in range(2):
        error = errors()
        loss = diffusion_dpo_loss(error[:1], error[1:], ref[:1], ref[1:], beta=1.0).mean()
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        norm = torch.stack([g.norm() for g in gradients if g is not None]).norm()
        with torch.no_grad():
            for p, g in zip(parameters, gradients):
                p -= 0.01 * g / norm if g is not None else 0
    assert losses[0] == pytest.approx(math.log(2)) and losses[1] < losses[0]


@pytest.mark.parametrize("name", ["SDXL", "Cosmos", "Cosmos2"])
def test_guidance_raises_the_reward_on_the_stock_solver(name):
    """Also of a pipeline that guides clean samples itself, and hands them to the step."""
    build, prompts, call, _ = PIPELINES[name]
    pipeline = RewardGuidedPipeline(build())

    def reward(scale: float) -> float:
        own = {"reward": lambda images, prompts: images.flatten(1).mean(1), "preset": "mpgd", "reward_scale": scale}
        return float(pipeline(prompt=prompts[:1], generator=torch.Generator().manual_seed(0), **own, **call).rewards)

    assert reward(1.0) > reward(0.0) + 0.01
