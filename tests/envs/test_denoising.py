"""The environments against Gymnasium's own checks, against each other, and against the policy's roll-outs."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from short_policies import brightness, policy_of

gymnasium = pytest.importorskip("gymnasium", reason="gymnasium is not installed: pip install gymnasium")
import numpy as np  # noqa: E402
from gymnasium.utils.env_checker import check_env, data_equivalence  # noqa: E402
from gymnasium.vector import SyncVectorEnv  # noqa: E402
from gymnasium.wrappers import FlattenObservation  # noqa: E402
from gymnasium.wrappers.vector import RecordEpisodeStatistics  # noqa: E402

from diffusers_align.driving.noise import step_streams  # noqa: E402
from diffusers_align.envs import DenoisingEnv, DenoisingVectorEnv  # noqa: E402

PROMPTS = ["a cat", "a red bird"]
KINDS = {"noise": {"action": "noise"}, "candidates": {"action": "candidates", "num_candidates": 3}}


@pytest.fixture(scope="module")
def policy():
    return policy_of()


def own_noises(policy, seed, shape, number):
    """What `Policy.rollout` draws for a sample with this seed, step by step."""
    (stream,) = step_streams([seed])
    return [torch.randn(1, *shape, generator=stream)[0] for _ in range(number)]


def walked(env, actions, **reset):
    """All that an episode shows under some actions."""
    shown = [env.reset(**reset)]
    shown += [env.step(action) for action in actions]
    return shown


@pytest.mark.parametrize("kind", KINDS)
def test_gymnasiums_checks_pass(policy, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*(infinity|symmetric and normalized|not within the observation space|No render modes).*")
        check_env(DenoisingEnv(policy, PROMPTS, brightness, **KINDS[kind]), skip_render_check=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_the_same_episode_again_and_another_one_gives_another(policy, kind):
    env = DenoisingEnv(policy, PROMPTS, brightness, **KINDS[kind])
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(env.task.num_decisions)]
    first, second, other = (walked(env, actions, seed=seed) for seed in (5, 5, 6))
    assert data_equivalence(first, second, exact=True)
    assert not np.array_equal(first[0][0]["sample"], other[0][0]["sample"])


@pytest.mark.parametrize("name", ["sd3", "sd15", "flux"])
def test_an_episode_under_the_samplers_own_noise_is_its_rollout(name):
    policy = policy_of(name)
    env = DenoisingEnv(policy, PROMPTS, brightness)
    observation, info = env.reset(seed=3)
    trajectory = policy.rollout([info["prompt"]], seeds=[info["seed"]])
    for k, noise in zip(trajectory.noisy_steps, own_noises(policy, info["seed"], env.task.shape, env.task.num_decisions)):
        assert np.array_equal(observation["sample"], trajectory.states[0, k].numpy()), k
        observation, reward, ended, truncated, info = env.step(noise.numpy())
    assert ended and not truncated
    assert np.array_equal(observation["sample"], trajectory.final[0].numpy())
    assert reward == pytest.approx(float(brightness(policy.decode(trajectory.final, trajectory.condition), None)), abs=1e-6)
    assert observation["time"] == 0


def test_the_first_candidate_is_the_samplers_own_noise_and_others_lead_elsewhere(policy):
    env = DenoisingEnv(policy, PROMPTS, brightness, **KINDS["candidates"])
    final = {}
    for action in (0, 1):
        _, info = env.reset(options={"row": 1, "seed": 11})
        assert info == {"prompt": "a red bird", "seed": 11}
        final[action] = walked(env, [action] * env.task.num_decisions, options={"row": 1, "seed": 11})[-1][0]["sample"]
    assert np.array_equal(final[0], policy.rollout(["a red bird"], seeds=[11]).final[0].numpy())
    assert not np.allclose(final[0], final[1])


def test_candidates_are_those_that_are_shown(policy):
    shown = DenoisingEnv(policy, PROMPTS, brightness, **KINDS["candidates"])
    told = DenoisingEnv(policy, PROMPTS, brightness)
    start = {"options": {"row": 0, "seed": 4}}
    seen, other = shown.reset(**start)[0], told.reset(**start)[0]
    while True:
        assert np.array_equal(seen["sample"], other["sample"])
        (seen, _, ended, *_), (other, *_) = shown.step(2), told.step(seen["candidates"][2])
        if ended:
            break
    assert np.array_equal(seen["sample"], other["sample"])
    assert not seen["candidates"].any()


def test_gains_add_up_to_the_final_reward_less_that_of_the_first_prediction(policy):
    dense, final = (DenoisingEnv(policy, PROMPTS, brightness, rewards=rewards) for rewards in ("gains", "final"))
    noises = own_noises(policy, 7, dense.task.shape, dense.task.num_decisions)
    earned = {env: [x[1] for x in walked(env, [n.numpy() for n in noises], options={"row": 0, "seed": 7})[1:]] for env in (dense, final)}
    trajectory = policy.rollout([PROMPTS[0]], seeds=[7])
    clean = []
    policy.drive(trajectory.condition, lambda step: clean.append(step.run().pred_original_sample) if not clean else None)
    before = float(brightness(policy.decode(clean[0], trajectory.condition), None))
    assert earned[final][:-1] == [0.0] * (len(noises) - 1)
    assert sum(earned[dense]) == pytest.approx(earned[final][-1] - before, abs=1e-6)
    assert all(earned[dense])


@pytest.mark.parametrize("kind", KINDS)
def test_the_vector_form_is_gymnasiums_own_of_single_ones(policy, kind):
    number = 3
    vector = DenoisingVectorEnv(policy, PROMPTS, brightness, num_envs=number, **KINDS[kind])
    single = SyncVectorEnv([lambda: DenoisingEnv(policy, PROMPTS, brightness, **KINDS[kind])] * number)
    assert (vector.observation_space, vector.action_space) == (single.observation_space, single.action_space)
    assert vector.metadata["autoreset_mode"] == single.metadata["autoreset_mode"]
    vector.action_space.seed(0)
    results = [vector.reset(seed=2), single.reset(seed=2)]
    for _ in range(2 * (vector.task.num_decisions + 1)):  # across two ends
        (seen, *rest), (expected, *wanted) = results
        assert seen in vector.observation_space
        assert {name: x.dtype for name, x in seen.items()} == {name: x.dtype for name, x in expected.items()}
        assert all(np.allclose(seen[name], expected[name], rtol=1e-4, atol=1e-5) for name in expected)
        assert all(np.allclose(x, y, atol=1e-5) and x.dtype == y.dtype for x, y in zip(rest[:-1], wanted[:-1]))
        assert all(np.array_equal(rest[-1][name], wanted[-1][name]) for name in ("prompt", "seed", "_prompt", "_seed"))
        actions = vector.action_space.sample()
        results = [vector.step(actions), single.step(actions)]


def test_vector_episodes_are_the_same_again_and_gymnasiums_wrappers_count_them(policy):
    env = RecordEpisodeStatistics(DenoisingVectorEnv(policy, PROMPTS, brightness, num_envs=2))
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(env.unwrapped.task.num_decisions)]
    first, second = walked(env, actions, seed=[1, 2]), walked(env, actions, seed=[1, 2])
    assert all(data_equivalence(x[:-1], y[:-1], exact=True) for x, y in zip(first, second))
    assert second[-1][-1]["episode"]["l"].tolist() == [len(actions)] * 2
    assert np.allclose(second[-1][-1]["episode"]["r"], second[-1][1])


def test_a_denoiser_call_a_step_and_the_pipeline_is_as_before():
    policy, calls = policy_of(), []
    env = DenoisingEnv(policy, PROMPTS, brightness)
    denoiser, forward = policy.pipeline.transformer, policy.pipeline.transformer.forward
    denoiser.forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)  # which gated calls never reach
    kind = type(policy.scheduler)
    env.reset(seed=0)
    for number in range(1, env.task.num_decisions + 1):
        assert type(policy.scheduler) is kind
        env.step(np.zeros(env.task.shape, np.float32))
        assert len(calls) == min(policy.call_kwargs["num_inference_steps"], number + 1)


def test_observations_can_be_flattened(policy):
    env = FlattenObservation(DenoisingEnv(policy, PROMPTS, brightness))
    observation, _ = env.reset(seed=0)
    assert observation.shape == (int(np.prod(env.unwrapped.task.shape)) + 1 + env.unwrapped.task.features.shape[1],)


def test_what_is_wrong_is_said(policy):
    env = DenoisingEnv(policy, PROMPTS, brightness)
    with pytest.raises(ValueError, match="reset the environment"):
        env.step(np.zeros(env.task.shape))
    with pytest.raises(ValueError, match="options are row and seed, got prompt"):
        env.reset(options={"prompt": "a cat"})
    env.reset(seed=0)
    with pytest.raises(ValueError, match="Actions of these 1 episodes have shape"):
        env.step(np.zeros(3))
    for _ in range(env.task.num_decisions):
        env.step(np.zeros(env.task.shape))
    with pytest.raises(ValueError, match="has ended"):
        env.step(np.zeros(env.task.shape))
    with pytest.raises(ValueError, match="need as many seeds, got 1"):
        DenoisingVectorEnv(policy, PROMPTS, brightness, num_envs=2).reset(seed=[0])


@pytest.mark.parametrize("action", [-1, 3, 0.5, np.nan])
def test_an_action_that_is_no_candidate_is_said(policy, action):
    """-1 took the last one."""
    env = DenoisingEnv(policy, PROMPTS[:1], brightness, action="candidates", num_candidates=3)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="numbers of candidates, from 0 to 2, got"):
        env.step(action)
    env.step(np.int64(2))


def test_a_noise_that_is_not_finite_is_said(policy):
    env = DenoisingEnv(policy, PROMPTS[:1], brightness)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="Actions are finite noises, got"):
        env.step(np.full(env.task.shape, np.nan))


WITHOUT = """
import sys
sys.modules["gymnasium"] = None
import diffusers_align.policy, diffusers_align.pipelines
try:
    import diffusers_align.envs
except ImportError as error:
    print(error)
"""


@pytest.mark.slow
def test_without_gymnasium_the_package_works_and_envs_says_what_to_install():
    result = subprocess.run([sys.executable, "-c", WITHOUT], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "pip install gymnasium" in result.stdout


def test_prompts_are_encoded_once_and_not_in_each_episode(policy, monkeypatch):
    env, encoded, encode = DenoisingEnv(policy, PROMPTS, brightness), [], policy.pipeline.encode_prompt
    walked(env, [env.action_space.sample()], seed=0, options={"row": 0})
    monkeypatch.setattr(policy.pipeline, "encode_prompt", lambda *args, **kwargs: encoded.append(1) or encode(*args, **kwargs))
    walked(env, [env.action_space.sample()], seed=1, options={"row": 0})
    assert not encoded


@pytest.mark.parametrize("options", [{"row": 0.5}, {"row": "a cat"}, {"row": 2}, {"seed": 2.5}, {"seed": -1}])
def test_options_that_are_no_whole_numbers_are_refused(policy, options):
    with pytest.raises(ValueError, match=f"options {next(iter(options))} must be a whole number"):
        DenoisingEnv(policy, PROMPTS, brightness).reset(seed=0, options=options)


def test_features_are_a_tensor(policy):
    with pytest.raises(TypeError, match="features must be a Tensor, or None, got a ndarray"):
        DenoisingEnv(policy, PROMPTS, brightness, features=np.zeros((2, 3)))


def test_what_is_no_policy_is_refused_with_what_to_give(policy):
    for other in ("mini-sd", policy.pipeline):
        with pytest.raises(TypeError, match=f"policy must be a Policy, got a {type(other).__name__}: Policy.pipe. makes one"):
            DenoisingEnv(other, PROMPTS, brightness)
        with pytest.raises(TypeError, match="policy must be a Policy"):
            DenoisingVectorEnv(other, PROMPTS, brightness, num_envs=2)
