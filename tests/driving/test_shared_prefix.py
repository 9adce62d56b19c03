"""Steps that the samples of a group share are walked once, and nothing else changes."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from diffusers_align import Policy, embedded, sde_twin
from diffusers_align.condition import Condition
from diffusers_align.driving.shared_prefix import _row

torch.set_num_threads(1)
PROMPTS, SEEDS, STEP_SEEDS = ["a fox", "a cat", "a fox", "a fox", "a cat"], [3, 4, 3, 5, 4], [10, 11, 12, 13, 14]


def policy_of(window, **call):
    pipe = DiffusionPipeline.from_pretrained(embedded.path("mini-sd3"))
    pipe.set_progress_bar_config(disable=True)
    policy = Policy(pipe, sde_twin(pipe.scheduler, sde_window=window), num_inference_steps=5, guidance_scale=1.0, max_sequence_length=1, **call)
    return policy, counted(pipe.transformer)


def counted(denoiser):
    """The rows of each real call from now on; gated calls do not come here."""
    rows, forward = [], denoiser.forward

    def count(*args, **kwargs):
        rows.append(len(kwargs["hidden_states"]))
        return forward(*args, **kwargs)

    denoiser.forward = count
    return rows


@pytest.mark.parametrize("window, calls", [((2, 4), [3, 3, 5, 5, 5]), ((4, 5), [3, 3, 3, 3, 5]), ((0, 2), [5] * 5), (None, [5] * 5)])
def test_steps_before_the_noise_are_walked_once_for_equal_prompts_and_seeds(window, calls):
    policy, rows = policy_of(window)
    condition = policy.condition(PROMPTS, seeds=SEEDS, step_seeds=STEP_SEEDS)
    whole = policy.rollout(condition)
    policy.rollout(condition, share_prefix=True)  # gates learn from a first real call of each size what they return
    rows.clear()
    shared = policy.rollout(condition, share_prefix=True)
    assert rows == calls
    for name in ("states", "actions", "log_probs"):
        torch.testing.assert_close(getattr(shared, name), getattr(whole, name), rtol=1e-4, atol=1e-4, equal_nan=True)
    for name in ("timesteps", "sigmas", "stochastic"):
        assert torch.equal(getattr(shared, name), getattr(whole, name))
    again = policy.transitions(shared)
    for k in shared.noisy_steps:
        assert torch.equal(again[k].log_prob(shared.actions[:, k]), shared.log_probs[:, k]), "a replay has the roll-out's log-probabilities, bit for bit"
    assert torch.equal(shared.states[0, 1], shared.states[2, 1]) or calls[0] == 5
    assert not torch.equal(shared.final[0], shared.final[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_a_replay_has_the_log_probabilities_bit_for_bit(dtype):
    policy, rows = policy_of((2, 4))
    policy.pipeline.to(dtype)
    condition = policy.condition(PROMPTS, seeds=SEEDS, step_seeds=STEP_SEEDS)
    policy.rollout(condition, share_prefix=True)
    rows.clear()
    shared = policy.rollout(condition, share_prefix=True)
    assert rows == [3, 3, 5, 5, 5]
    again = policy.transitions(shared)
    for k in shared.noisy_steps:
        assert torch.equal(again[k].log_prob(shared.actions[:, k]), shared.log_probs[:, k])


def test_nothing_is_shared_where_all_differ_or_a_call_draws_nothing():
    policy, rows = policy_of((2, 4))
    different = policy.condition(PROMPTS, seeds=[1, 2, 3, 4, 5])
    policy.rollout(different, share_prefix=True)
    policy.rollout(policy.condition(PROMPTS, seeds=SEEDS), share_prefix=True, deterministic=True)
    assert rows == [5] * 10


def test_in_lockstep_nothing_is_shared():
    """Processes whose rows differ would make other numbers of calls, and wait for each other."""
    policy, rows = policy_of((2, 4))
    policy.lockstep = True
    policy.rollout(policy.condition(PROMPTS, seeds=SEEDS, step_seeds=STEP_SEEDS), share_prefix=True)
    assert rows == [5] * 5


def test_denoisers_that_remember_steps_are_refused():
    policy, _ = policy_of((2, 4))
    policy.pipeline.transformer._cache_config = type("SomeConfig", (), {})()
    with pytest.raises(ValueError, match="steps that samples share would not be those of a whole pass"):
        policy.rollout(policy.condition(PROMPTS, seeds=SEEDS), share_prefix=True)


def test_arrays_of_equal_numbers_are_equal_and_others_are_not():
    condition = lambda rows: Condition(["a", "a"], seeds=[1, 1], per_sample={"x": rows})  # noqa: E731
    for rows, equal in ((np.ones((2, 3)), True), (np.arange(6).reshape(2, 3), False), (torch.arange(6).reshape(2, 3), False), (["u", "u"], True)):
        own = condition(rows)
        assert (_row(own, 0) == _row(own, 1)) == equal


def test_samples_with_pictures_of_their_own_share_nothing():
    from diffusers import StableDiffusion3Img2ImgPipeline

    pipe = StableDiffusion3Img2ImgPipeline.from_pretrained(embedded.path("mini-sd3"))
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 5, "strength": 1.0, "guidance_scale": 1.0, "max_sequence_length": 1}
    policy, rows = Policy(pipe, sde_twin(pipe.scheduler, sde_window=(2, 4)), **call), counted(pipe.transformer)
    pictures = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    for own, expected in ((pictures, [2] * 5), (pictures[:1] * 2, [1, 1, 2, 2, 2])):
        for _ in range(2):
            rows.clear()
            policy.rollout(["a fox"] * 2, seeds=[7, 7], step_seeds=[1, 2], per_sample={"image": own}, share_prefix=True)
        assert rows == expected
