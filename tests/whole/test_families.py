"""Every promise of `Policy`, on stock pipelines of many families: nothing in the library knows any of them.

The first denoiser's LoRA is fresh (B = 0) unless a test moves it, so the policy is the one that made the trajectory.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_pipelines import FAMILIES, Family
from torch import Tensor, nn

from diffusers_align import Policy, Trajectory, transition

# From diffusers itself: one picture for two prompts, and a solver's tables built from tensors.
pytestmark = [
    pytest.mark.filterwarnings("ignore:You have passed 2 text prompts:FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

PROMPTS, SEEDS = ["a cat", "a large red dog"], [11, 12]


@dataclass
class Subject:
    """A policy with a fresh LoRA, what it sampled before it had one, and the pipeline untouched."""

    family: Family
    stock: DiffusionPipeline
    policy: Policy
    trajectory: Trajectory
    lora: list[nn.Parameter]


@pytest.fixture(scope="module", params=FAMILIES)
def subject(request) -> Iterator[Subject]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    family = FAMILIES[request.param]
    policy, stock = Policy(family.build(), **family.call), family.build()
    trajectory = policy.rollout(PROMPTS, seeds=SEEDS)
    yield Subject(family, stock, policy, trajectory, policy.add_lora(rank=4))
    torch.set_num_threads(threads)


@contextmanager
def moved(policy: Policy) -> Iterator[None]:
    """The policy with a LoRA that does something; fresh again afterwards."""
    torch.manual_seed(1)
    matrices = [p for module in policy.denoisers.values() for name, p in module.named_parameters() if ".lora_B." in name]
    for matrix in matrices:
        matrix.data.normal_(std=0.3)
    try:
        yield
    finally:
        for matrix in matrices:
            matrix.data.zero_()


def stochastic_steps(trajectory: Trajectory) -> list[int]:
    return trajectory.stochastic.nonzero().flatten().tolist()


def smooth(shape: torch.Size) -> Tensor:
    """Random pictures or videos in [0, 1] without pixel noise, which no autoencoder keeps."""
    generator = torch.Generator().manual_seed(2)
    coarse = torch.rand(shape[:-3].numel(), shape[-3], 3, 3, generator=generator)
    return nn.functional.interpolate(coarse, size=shape[-2:], mode="bilinear").reshape(shape)


def autoencoded(vae: nn.Module, images: Tensor) -> Tensor:
    """Pictures or videos after a round trip through the autoencoder, in [0, 1], without any pipeline."""
    pixels = images * 2 - 1
    takes_videos = next(p for p in vae.encoder.parameters() if p.ndim > 3).ndim == 5
    if takes_videos:
        pixels = pixels[:, :, None] if images.ndim == 4 else pixels.transpose(1, 2)
    code = vae.encode(pixels)
    decoded = vae.decode(code.latent_dist.mode() if hasattr(code, "latent_dist") else code.latent).sample
    if takes_videos:
        decoded = decoded.squeeze(2) if images.ndim == 4 else decoded.transpose(1, 2)
    return (decoded / 2 + 0.5).clamp(0, 1)


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def test_the_rollout_is_a_trajectory_of_finite_numbers(subject):
    trajectory = subject.trajectory
    steps = stochastic_steps(trajectory)
    assert trajectory.num_steps >= 3 and len(steps) >= 2
    assert trajectory.samples.isfinite().all()
    assert trajectory.log_probs[:, steps].isfinite().all()
    assert not torch.equal(trajectory.final[0], trajectory.final[1])


def test_the_same_seeds_give_the_same_trajectory(subject):
    again = subject.policy.rollout(PROMPTS, seeds=SEEDS)
    other = subject.policy.rollout(PROMPTS, seeds=[13, 14])
    assert torch.equal(again.samples, subject.trajectory.samples)
    assert not torch.equal(other.final, subject.trajectory.final)


def test_a_sample_depends_on_neither_its_batch_nor_its_neighbours(subject):
    picture = subject.family.call.get("image")
    pictures = None if picture is None else {"image": torch.cat([picture, picture.flip(-1)])}
    together = subject.policy.rollout(PROMPTS, seeds=SEEDS, per_sample=pictures)
    alone = subject.policy.rollout(together.condition.select([1]))
    assert relative_error(alone.final, together.final[1:]) <= 1e-3
    assert relative_error(alone.final, together.final[:1]) > 1e-2


def test_step_seeds_govern_the_noise_of_the_steps_alone(subject):
    """Also where the pipeline hands a generator of its own to the scheduler."""
    first, again, other = (subject.policy.rollout(PROMPTS, seeds=SEEDS, step_seeds=seeds) for seeds in ([21, 22], [21, 22], [21, 23]))
    assert torch.equal(first.states[:, 0], subject.trajectory.states[:, 0]) and torch.equal(other.states[:, 0], first.states[:, 0])
    assert torch.equal(again.samples, first.samples)
    assert torch.equal(other.final[0], first.final[0])
    for a, b in ((first.final, subject.trajectory.final), (other.final[1], first.final[1]), (first.final[0], first.final[1])):
        assert relative_error(a, b) > 1e-2
    assert torch.equal(subject.policy.rollout(PROMPTS, seeds=SEEDS, step_seeds=SEEDS).samples, subject.trajectory.samples)


def test_the_noise_of_a_stochastic_completion_is_its_own(subject, monkeypatch):
    policy, trajectory, drawn = subject.policy, subject.trajectory, []

    def keep(*args, **kwargs):
        drawn.append(draw(*args, **kwargs))
        return drawn[-1]

    draw = transition.standard_normal
    monkeypatch.setattr(transition, "standard_normal", keep)
    policy.rollout(PROMPTS, seeds=SEEDS)
    of_rollout = drawn.copy()
    start = len(of_rollout) - 2  # two draws at least are left to make
    k = stochastic_steps(trajectory)[start]
    finals = [policy.complete(trajectory, k, deterministic=False, seeds=seeds) for seeds in (None, None, [7, 8], [8, 7])]
    default, same, seven, eight = (drawn[len(of_rollout) + 2 * i :][:2] for i in range(4))
    assert torch.equal(finals[0], finals[1]) and torch.equal(torch.stack(default), torch.stack(same))
    assert relative_error(finals[2], finals[0]) > 1e-3 and relative_error(finals[3], finals[2]) > 1e-3
    for noise in (*default, *seven, *eight):
        others = [other for other in (*of_rollout, *default, *seven) if other is not noise]
        assert max(abs(correlation(noise, other)) for other in others) < 0.3


def test_a_second_policy_on_the_same_pipeline_samples_the_same(subject):
    pipeline = subject.family.build()
    Policy(pipeline)
    again = Policy(pipeline, **subject.family.call).rollout(PROMPTS, seeds=SEEDS)
    assert torch.equal(again.timesteps, subject.trajectory.timesteps)
    assert torch.equal(again.samples, subject.trajectory.samples)


def test_replay_returns_the_log_probs_bit_for_bit_with_gradients(subject):
    policy, trajectory = subject.policy, subject.trajectory
    replayed, gradients = {}, {}

    def on_step(k, transition):
        log_prob = transition.log_prob(trajectory.actions[:, k])
        replayed[k] = log_prob.detach()
        for parameter in subject.lora:
            parameter.grad = None
        log_prob.sum().backward()
        gradients[k] = sum(float(p.grad.abs().sum()) for p in subject.lora if p.grad is not None)

    with torch.enable_grad():
        policy.replay(trajectory, on_step)
    assert sorted(replayed) == stochastic_steps(trajectory)
    for k, log_prob in replayed.items():
        assert torch.equal(log_prob, trajectory.log_probs[:, k]), f"step {k}"
        assert gradients[k] > 0, f"step {k}"


def test_one_transition_is_that_of_the_whole_replay(subject):
    policy, trajectory = subject.policy, subject.trajectory
    k = stochastic_steps(trajectory)[1]
    found = {}
    with torch.no_grad(), moved(policy):
        policy.replay(trajectory, found.__setitem__)
        alone = policy.transition(trajectory, k)
    assert torch.equal(alone.mean, found[k].mean)
    assert torch.equal(alone.std, found[k].std)
    assert not torch.equal(alone.log_prob(trajectory.actions[:, k]), trajectory.log_probs[:, k])


def test_predict_takes_a_time_for_each_sample(subject):
    policy, trajectory = subject.policy, subject.trajectory
    latents, condition, times = trajectory.states[:, 1], trajectory.condition, trajectory.timesteps[[1, -1]]
    assert times[0] != times[1]
    with torch.no_grad():
        together = policy.predict(latents, times, condition)
        alone = torch.cat([policy.predict(latents[[i]], times[[i]], condition.select([i])) for i in range(2)])
        same_time = policy.predict(latents, times[[0, 0]], condition)
    assert relative_error(together, alone) <= 1e-4
    assert relative_error(same_time[:1], alone[:1]) <= 1e-4
    assert relative_error(same_time[1:], alone[1:]) > 1e-3, "the time of the second sample made no difference"


def test_predict_has_gradients(subject):
    policy, trajectory = subject.policy, subject.trajectory
    for parameter in subject.lora:
        parameter.grad = None
    with torch.enable_grad():
        output = policy.predict(trajectory.states[:, 1], trajectory.timesteps[[1, -1]], trajectory.condition)
        output.square().mean().backward()
    assert sum(float(p.grad.abs().sum()) for p in subject.lora if p.grad is not None) > 0


@torch.no_grad()
def test_predict_with_guidance_is_what_the_rollout_saw(subject):
    policy, trajectory = subject.policy, subject.trajectory
    k = stochastic_steps(trajectory)[1]
    state, time = trajectory.states[:, k], trajectory.timesteps[k]
    output = policy.predict(state, time.expand(len(state)), trajectory.condition, guidance=True)
    expected = policy.transition(trajectory, k).mean
    actual = policy.scheduler.transition(output, time.to(policy.scheduler.timesteps), state).mean
    assert relative_error(actual, expected) <= 1e-5


def test_reference_is_the_pretrained_model(subject):
    policy, trajectory = subject.policy, subject.trajectory
    with moved(policy):
        trained = policy.rollout(PROMPTS, seeds=SEEDS).final
        with policy.reference():
            pretrained = policy.rollout(PROMPTS, seeds=SEEDS).final
        again = policy.rollout(PROMPTS, seeds=SEEDS).final
    assert torch.equal(pretrained, trajectory.final)
    assert not torch.equal(trained, pretrained)
    assert torch.equal(again, trained)
    assert all(p.requires_grad for p in subject.lora)


def test_a_saved_lora_loads_into_a_stock_pipeline(subject, tmp_path, caplog):
    policy, fresh = subject.policy, subject.family.build()
    with moved(policy), caplog.at_level(logging.WARNING):
        expected = policy.rollout(PROMPTS, seeds=SEEDS).final
        policy.save_lora(tmp_path)
    if hasattr(fresh, "load_lora_weights"):
        assert "no LoRA loader" not in caplog.text
        fresh.load_lora_weights(tmp_path)
        loaded = Policy(fresh, **subject.family.call)
    else:
        assert "no LoRA loader" in caplog.text
        loaded = Policy(fresh, **subject.family.call)
        loaded.load_lora(tmp_path)
    final = loaded.rollout(PROMPTS, seeds=SEEDS).final
    assert relative_error(final, subject.trajectory.final) > 1e-3
    assert relative_error(final, expected) <= 1e-5


def test_a_saved_lora_loads_into_a_lora_that_trains_on(subject, tmp_path):
    policy = subject.policy
    with moved(policy):
        expected = policy.rollout(PROMPTS, seeds=SEEDS).final
        policy.save_lora(tmp_path)
    other = Policy(copy.deepcopy(subject.stock), **subject.family.call)
    parameters = other.add_lora(rank=4)
    other.load_lora(tmp_path)
    assert relative_error(other.rollout(PROMPTS, seeds=SEEDS).final, expected) <= 1e-5
    assert all(p.requires_grad for p in parameters)


@torch.no_grad()
def test_encode_and_decode_are_the_autoencoders_own(subject):
    policy, trajectory = subject.policy, subject.trajectory
    images = smooth(policy.decode(trajectory.final).shape)
    latents = policy.encode(images)
    expected = autoencoded(policy.pipeline.vae, images)
    assert latents.shape == trajectory.final.shape and latents.dtype == trajectory.final.dtype
    assert expected.std() > 0.01
    assert relative_error(policy.decode(latents), expected) <= 1e-3


def test_rewards_of_pixels_have_gradients_in_the_latents(subject):
    policy = subject.policy
    latents = policy.encode(smooth(policy.decode(subject.trajectory.final).shape)).requires_grad_()
    with torch.enable_grad():
        policy.decode(latents).mean().backward()
    assert latents.grad.isfinite().all() and latents.grad.flatten(1).abs().sum(1).gt(0).all()


def test_complete_goes_on_from_where_the_trajectory_stands(subject):
    policy, trajectory = subject.policy, subject.trajectory
    last = trajectory.num_steps
    ode = policy.rollout(PROMPTS, seeds=SEEDS, deterministic=True)
    assert torch.equal(policy.complete(trajectory, last), trajectory.final)
    assert torch.equal(policy.complete(trajectory, 0), ode.final)
    assert torch.equal(policy.complete(ode, last // 2), ode.final)
    assert not torch.equal(policy.complete(trajectory, 1), ode.final)


def test_the_deterministic_rollout_is_the_stock_pipelines(subject):
    """Only where the stock scheduler is one that the twin inherits from; others are followed by their own tests."""
    if not isinstance(subject.policy.scheduler, type(subject.stock.scheduler)):
        pytest.skip("the stock scheduler is a solver of another kind")
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    stock = subject.stock(prompt=list(PROMPTS), generator=generators, output_type="latent", **subject.family.call)[0]
    assert torch.equal(subject.policy.rollout(PROMPTS, seeds=SEEDS, deterministic=True).final, stock)
