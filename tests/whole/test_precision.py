"""The bit-for-bit promises of `Policy` in float32, bfloat16 and float16, for one sample and for four, on the CPU.

Kernels round by dtype, by memory layout and by batch size, so a replay that is exact in one setting says nothing of another.
"""

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from tiny_pipelines import FAMILIES
from torch import nn

from diffusers_align import Policy, Trajectory, sde_twin
from diffusers_align.driving.tape import Tape
from diffusers_align.pipelines import ParticleSteeringPipeline
from diffusers_align.training.online.step_candidates import roll_out_candidates

pytestmark = [
    pytest.mark.filterwarnings("ignore:You have passed . text prompts:FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`upcast_vae` is deprecated:FutureWarning"),
]


PROMPTS, SEEDS = ["a cat", "a large red dog", "x", "two birds"], [11, 12, 13, 14]
DTYPES, HALF = [torch.float32, torch.bfloat16, torch.float16], [torch.bfloat16, torch.float16]
name_of = lambda dtype: str(dtype).removeprefix("torch.")  # noqa: E731


def make(name: str, dtype: torch.dtype) -> Policy:
    torch.set_num_threads(1)
    return Policy(FAMILIES[name].build().to(dtype), **FAMILIES[name].call)


@torch.no_grad()
def broken_promises(policy: Policy, stock, call: dict, prompts: list[str], seeds: list[int]) -> list[str]:
    """What does not hold to the bit, of a policy with a fresh LoRA."""
    with policy.reference():
        trajectory = policy.rollout(prompts, seeds=seeds)
    again, outputs = sampled_again(policy, trajectory)
    k, replayed = trajectory.noisy_steps[-1], policy.transitions(trajectory)
    held = {f"log_prob {i}": torch.equal(kernel.log_prob(trajectory.actions[:, i]), trajectory.log_probs[:, i]) for i, kernel in replayed.items()}
    held["the same seeds"] = torch.equal(again.samples, trajectory.samples)
    with torch.enable_grad():
        alone = policy.transition(trajectory, k)
        alone.log_prob(trajectory.actions[:, k]).sum().backward()
    held["one transition"] = torch.equal(alone.mean, replayed[k].mean)
    held["gradient"] = any(p.grad is not None and bool(p.grad.any()) for p in policy.trainable_parameters())
    state, time = trajectory.states[:, k].float(), trajectory.timesteps[k].expand(len(seeds))
    held["predict"] = torch.equal(policy.predict(state, time, trajectory.condition, guidance=True), outputs[k])
    ode = policy.rollout(prompts, seeds=seeds, deterministic=True)
    held["complete"] = torch.equal(policy.complete(ode, 2), ode.final)
    held["decode"] = torch.equal(policy.decode(ode.final.float(), ode.condition), policy.decode(ode.final, ode.condition))
    if isinstance(policy.scheduler, type(stock.scheduler)):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        held["the stock pipeline's"] = torch.equal(ode.final, stock(prompt=list(prompts), generator=generators, output_type="latent", **call)[0])
    return [name for name, holds in held.items() if not holds]


def sampled_again(policy: Policy, trajectory: Trajectory) -> tuple[Trajectory, list[torch.Tensor]]:
    """A roll-out from the same condition, and what the scheduler got from the denoiser at each of its steps."""
    outputs, tape = [], Tape()

    def record(step):
        outputs.append(step.model_output)
        tape.record(step)

    with policy.noise(trajectory.condition, False):
        policy.drive(trajectory.condition, record)
    return tape.trajectory(trajectory.condition), outputs


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("name", FAMILIES)
def test_what_holds_to_the_bit(name, dtype):
    policy, stock = make(name, dtype), FAMILIES[name].build().to(dtype)
    for module in stock.components.values():
        if isinstance(module, nn.Module):
            module.requires_grad_(False)  # as the policy's: on some processors kernels are chosen, and round, by that flag
    policy.add_lora(rank=2)
    assert {batch: broken_promises(policy, stock, FAMILIES[name].call, PROMPTS[:batch], SEEDS[:batch]) for batch in (1, 4)} == {1: [], 4: []}


@torch.no_grad()
def test_a_replay_has_the_rollouts_layout_whatever_became_of_the_trajectory(tmp_path):
    """Packed latents meet a linear layer first, whose kernel depends on the strides; the others' states are not contiguous."""
    for name in ("flux", "ltx"):
        policy = make(name, torch.bfloat16)
        trajectory = policy.rollout(PROMPTS, seeds=SEEDS)
        trajectory.save(tmp_path / "trajectory.safetensors")
        joined = Trajectory.cat([trajectory.select([0, 1]), trajectory.select([2, 3])])
        wider = replace(trajectory, states=trajectory.states.double(), actions=trajectory.actions.double())
        for other in (Trajectory.load(tmp_path / "trajectory.safetensors"), joined, wider):
            kernels = policy.transitions(other)
            assert all(torch.equal(kernel.log_prob(trajectory.actions[:, k]), trajectory.log_probs[:, k]) for k, kernel in kernels.items())


@torch.no_grad()
def test_a_pipeline_that_writes_into_its_state_writes_into_no_tensor_of_ours():
    def halve(pipeline, k, t, tensors):
        tensors["latents"].mul_(0.5)
        return tensors

    policy = Policy(FAMILIES["sd3"].build(), **FAMILIES["sd3"].call, callback_on_step_end=halve)
    trajectory = policy.rollout(PROMPTS[:1], seeds=SEEDS[:1])
    assert torch.equal(trajectory.states[:, 2], trajectory.actions[:, 1] / 2)
    before, latents = trajectory.actions.clone(), trajectory.final.clone()
    kernels = policy.transitions(trajectory)
    policy.complete(trajectory, 2)
    policy.decode(latents, trajectory.condition)
    assert torch.equal(trajectory.actions, before) and torch.equal(latents, trajectory.final)
    assert all(torch.equal(kernel.log_prob(trajectory.actions[:, k]), trajectory.log_probs[:, k]) for k, kernel in kernels.items())


@pytest.mark.parametrize("dtype", HALF, ids=name_of)
def test_candidates_and_particles_run_in_half_precision_where_some_steps_are_deterministic(dtype):
    policy = Policy(FAMILIES["sd3"].build().to(dtype), sde_twin(FlowMatchEulerDiscreteScheduler(shift=3.0), sde_window=(1, 3)), **FAMILIES["sd3"].call)
    candidates = roll_out_candidates(policy, PROMPTS[:2], SEEDS[:2], 2)
    assert candidates.clean.dtype == candidates.drawn.dtype == candidates.trajectory.states.dtype == dtype
    assert policy.decode(candidates.clean[:, 3, 0], candidates.trajectory.condition).dtype == dtype

    pipeline, call = FAMILIES["sd3"].build().to(dtype), FAMILIES["sd3"].call
    options = {"num_particles": 2, "start": 0.0, "end": 1.0, "resample_every": 1, "scheduler": sde_twin(pipeline.scheduler, sde_window=(2, 3))}
    generator, brightness = torch.Generator().manual_seed(0), lambda images, prompts, **columns: images.float().mean((1, 2, 3))
    output = ParticleSteeringPipeline(pipeline)(PROMPTS[:1], reward=brightness, generator=generator, output_type="pt", **options, **call)
    assert output.images.isfinite().all() and output.rewards.isfinite().all()


@pytest.mark.parametrize("dtype", HALF, ids=name_of)
def test_with_a_window_of_diffusion_a_replay_has_the_roll_outs_log_probabilities(dtype):
    policy = Policy(FAMILIES["sd15"].build().to(dtype), sde_twin(DDIMScheduler(clip_sample=False), sde_window=(1, 3)), **FAMILIES["sd15"].call)
    trajectory = policy.rollout(PROMPTS[:2], seeds=SEEDS[:2])
    kernels = policy.transitions(trajectory)
    assert trajectory.states.dtype == dtype and trajectory.noisy_steps == list(kernels) == [1, 2]
    assert all(torch.equal(kernel.log_prob(trajectory.actions[:, k]), trajectory.log_probs[:, k]) for k, kernel in kernels.items())
    assert torch.equal(trajectory.actions[:, :-1], trajectory.states[:, 1:]), "steps without noise hand on what they return"


@pytest.mark.parametrize("name", ["sd15", "sd15_img2img", "sdxl", "sd3", "flux", "wan"])
def test_the_map_to_latents_is_exact_in_a_half_precision_pipeline(name):
    """The autoencoder's weights are made numbers of bfloat16 first, so that nothing but the precision of the computation differs."""
    exact, half = make(name, torch.float32), make(name, torch.bfloat16)
    exact.pipeline.vae.to(torch.bfloat16).to(torch.float32)
    images = torch.rand(exact.decode(exact.rollout(PROMPTS[:2], seeds=SEEDS[:2]).final).shape, generator=torch.Generator().manual_seed(0))
    expected, latents = exact.encode(images), half.encode(images)
    (found,), (wanted,) = (policy._layouts._known.values() for policy in (half, exact))
    assert torch.equal(found.scale, wanted.scale) and torch.equal(found.shift, wanted.shift)
    assert latents.dtype == half.rollout(PROMPTS[:1], seeds=SEEDS[:1]).final.dtype
    torch.testing.assert_close(latents.float(), expected.to(latents.dtype).float(), rtol=1e-2, atol=1e-5)
    assert half.pipeline.vae.dtype == torch.bfloat16


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, *HALF], ids=name_of)
def test_latents_of_another_precision_are_decoded_and_evaluated(dtype):
    for name in ("sd15", "sd3", "wan"):
        policy = make(name, dtype)
        trajectory = policy.rollout(PROMPTS[:2], seeds=SEEDS[:2])
        own = trajectory.final.dtype
        for given in (torch.float32, torch.float64):
            latents = trajectory.final.to(given)
            assert torch.equal(policy.decode(latents, trajectory.condition), policy.decode(latents.to(own), trajectory.condition))
            times = trajectory.timesteps[[1, -1]]
            assert torch.equal(policy.predict(latents, times, trajectory.condition), policy.predict(latents.to(own), times, trajectory.condition))
