"""Rewards of single steps, from completions on a real pipeline."""

import math

import pytest
import torch
from diffusers import DiffusionPipeline
from script_tools import make_run

from diffusers_align import Policy, embedded, sde_twin
from diffusers_align.algorithms.dense_grpo import step_gains
from diffusers_align.data.prompts import Prompt
from diffusers_align.training.online.sampling import Samples
from diffusers_align.training.online.step_rewards import NoiseLevels, calibrate_noise, completion_rewards

PROMPTS = ["a cat", "a cat", "two dogs", "two dogs"]
STEPS = 4


# --- completions on a pipeline -----------------------------------------------------------------------------------------


def brightness(images, prompts, **columns):
    return images.flatten(1).mean(1)


def make_policy(window=None):
    pipeline = DiffusionPipeline.from_pretrained(embedded.path("mini-sd3"))
    scheduler = sde_twin(pipeline.scheduler, sde_type="dance_grpo", noise_level=[0.8] * STEPS, sde_window=window)
    return Policy(pipeline, scheduler, num_inference_steps=STEPS, guidance_scale=1.0, max_sequence_length=1)


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "out")


@torch.no_grad()
def sample(policy, reward=brightness) -> Samples:
    """Two batches of two, which share their initial noise within a group."""
    batches = [policy.rollout(PROMPTS[b : b + 2], seeds=[b, b], step_seeds=[10 + b, 11 + b]) for b in (0, 2)]
    rewards = torch.cat([reward(policy.decode(t.final, t.condition).float(), t.condition.prompts) for t in batches])
    index, groups = [torch.tensor([0, 1]), torch.tensor([2, 3])], torch.tensor([0, 0, 1, 1])
    return Samples(batches, index, PROMPTS, groups, rewards, {"reward": rewards}, [Prompt(text) for text in PROMPTS])


@torch.no_grad()
def rewards_of_rollouts(policy, seeds):
    trajectories = [policy.rollout(PROMPTS[b : b + 2], seeds=[s, s], deterministic=True) for b, s in zip((0, 2), seeds)]
    return torch.cat([brightness(policy.decode(t.final, t.condition).float(), t.condition.prompts) for t in trajectories])


@pytest.fixture(scope="module")
def policy():
    return make_policy()


def test_gains_telescope_from_the_ode_of_the_same_initial_noise_to_the_sample(policy, run):
    samples = sample(policy)
    rewards = completion_rewards(run, policy, brightness, samples, list(range(STEPS)))
    assert rewards.shape == (4, STEPS + 1) and rewards.isfinite().all()
    assert torch.equal(rewards[:, -1], samples.rewards), "the last state is the sample"
    assert torch.equal(rewards[:, 0], rewards_of_rollouts(policy, [0, 2])), "the first completion is the ODE's own rollout, bit for bit"
    gains = step_gains(rewards)
    torch.testing.assert_close(gains.sum(1), samples.rewards - rewards_of_rollouts(policy, [0, 2]), rtol=0, atol=1e-6)
    assert (gains.abs() > 1e-5).all(), "every step has its noise"
    # The baseline is the trajectory's own: with another initial noise it would differ by more than any step gains.
    assert (rewards[:, 0] - rewards_of_rollouts(policy, [5, 6])).abs().min() > 1e-3
    assert rewards[0, 0] == rewards[1, 0] and rewards[2, 0] == rewards[3, 0], "one noise a group, one baseline"


def test_only_states_around_trained_steps_are_completed_and_calls_are_as_many_as_said(policy, run):
    calls = []
    policy.pipeline.transformer.transformer_blocks[0].register_forward_hook(lambda *_: calls.append(1))
    for window, steps, completed, expected in [(None, [0, 1, 2], [0, 1, 2, 3], 10), ([0, 2], [0, 1], [0, 1, 2], 7), ([1, 3], [1], [1, 2], 5)]:
        policy.scheduler.register_to_config(sde_window=window)
        samples = sample(policy)
        calls.clear()
        rewards = completion_rewards(run, policy, brightness, samples, steps)
        assert len(calls) == expected * len(samples.batches), "T (T + 1) / 2, or w (T - s) - w (w - 1) / 2"
        assert [i for i in range(STEPS + 1) if rewards[0, i].isfinite()] == completed
    policy.scheduler.register_to_config(sde_window=None)


def test_states_behind_the_last_noisy_step_lead_to_the_sample(run):
    policy = make_policy(window=[0, 2])
    samples = sample(policy)
    for trajectory in samples.batches:
        assert torch.equal(policy.complete(trajectory, 2), trajectory.final)
        assert not torch.equal(policy.complete(trajectory, 1), trajectory.final)
    rewards = completion_rewards(run, policy, brightness, samples, [0, 1])
    assert torch.equal(rewards[:, 2], samples.rewards)


def test_rounds_of_calibration_set_the_schedulers_noise(policy, tmp_path):
    calibration = {"calibration_rounds": 2, "calibration_tolerance": 5, "calibration_increment": 0.125}
    run = make_run(tmp_path / "out", num_prompts_per_epoch=2, group_size=2, same_latent=True, **calibration)
    levels = NoiseLevels(0.5, STEPS)
    calibrate_noise(run, policy, brightness, [Prompt("a cat"), Prompt("two dogs")], levels)
    # four samples never differ by five, so psi rises twice
    assert levels.rounds == 2 and levels.psi.tolist() == [0.75] * STEPS == list(policy.scheduler.config.noise_level)
    sigmas = policy.scheduler.sigmas.tolist()
    for k in range(STEPS):
        assert policy.scheduler.kernel(k).std == pytest.approx(0.75 * math.sqrt(sigmas[k] - sigmas[k + 1]), rel=1e-6)

    restored = NoiseLevels(9.0, STEPS)
    restored.load_state_dict(levels.state_dict())
    run.args.calibration_tolerance = -1
    calibrate_noise(run, policy, brightness, [], restored)
    assert restored.psi.tolist() == [0.75] * STEPS, "all rounds are done: none is left to sample"
    with pytest.raises(ValueError, match="--num_inference_steps is 6, but this pipeline takes 4 steps"):
        calibrate_noise(run, policy, brightness, [Prompt("a cat"), Prompt("two dogs")], NoiseLevels(0.5, 6))
