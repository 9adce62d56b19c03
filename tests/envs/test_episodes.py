"""What tasks are made of and what they refuse, without Gymnasium."""

import pytest
import torch
from short_policies import brightness, policy_of

pytest.importorskip("gymnasium", reason="gymnasium is not installed: pip install gymnasium")
from diffusers_align.envs.episodes import Episodes, make_task  # noqa: E402


@pytest.fixture(scope="module")
def policy():
    return policy_of()


def test_times_fall_from_one_to_nothing(policy):
    task = make_task(policy, ["a cat"], brightness)
    times = [task.time(k) for k in [*task.trajectory.noisy_steps, None]]
    assert times == sorted(times, reverse=True) and times[0] == pytest.approx(1, abs=0.01) and times[-1] == 0


def test_features_are_the_encoded_prompts_or_those_that_are_given(policy):
    task = make_task(policy, ["a cat", "a dog"], brightness)
    assert torch.equal(task.features, policy.prompt_features(policy.condition(["a cat", "a dog"], seeds=[0, 0])))
    given = torch.eye(2)
    assert torch.equal(Episodes(make_task(policy, ["a cat", "a dog"], brightness, features=given), [1], [0]).task.features, given)


def test_columns_are_those_of_the_episodes_prompt(policy):
    def wanted(images, prompts, level):
        return torch.tensor([float(x) for x in level])

    task = make_task(policy, ["a cat", "a dog"], wanted, columns={"level": [1, 2]})
    episodes = Episodes(task, [1, 0], [0, 1])
    while not episodes.ended:
        rewards = episodes.step(torch.zeros(2, *task.shape).numpy())
    assert rewards.tolist() == [2, 1]


def test_what_is_no_task_is_refused(policy):
    with pytest.raises(ValueError, match="num_candidates"):
        make_task(policy, ["a cat"], brightness, action="candidates", num_candidates=0)
    with pytest.raises(ValueError, match="action"):
        make_task(policy, ["a cat"], brightness, action="latents")
    with pytest.raises(ValueError, match="a row for each of the 1 prompts"):
        make_task(policy, ["a cat"], brightness, features=torch.zeros(2, 3))


def test_a_sampler_without_noise_has_no_actions():
    policy = policy_of("sd15")
    policy.scheduler.register_to_config(eta=0.0)
    with pytest.raises(ValueError, match="no action: raise the scheduler's noise"):
        make_task(policy, ["a cat"], brightness)


def test_a_denoiser_that_remembers_steps_is_refused():
    from diffusers.hooks import FirstBlockCacheConfig

    policy = policy_of("flux")
    policy.pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="has a FirstBlockCache|remembers earlier steps"):
        make_task(policy, ["a cat"], brightness)
