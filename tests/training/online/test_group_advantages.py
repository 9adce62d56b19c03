"""The advantages that the flags ask for."""

import pytest
import torch
from moved_policy import randn

from diffusers_align.rewards.base import WeightedSum
from diffusers_align.rl import group_advantages, multi_reward_advantages
from diffusers_align.training.online.group_advantages import advantages_of
from diffusers_align.training.online.sampling import Samples

# --- advantages from the flags -----------------------------------------------------------------------------------------


def asked(**flags):
    import argparse

    return argparse.Namespace(**{"multi_reward": "sum", "baseline": "group", "global_std": True, "std_ddof": 0, "adv_clip_max": 5.0, **flags})


def samples_of(**components):
    groups = torch.arange(2).repeat_interleave(6)
    rewards = components["first"] + 0.5 * components["second"]
    return Samples([], [], ["a"] * 12, groups, rewards, {"reward": rewards, **components}, [])


def scored():
    first, second = randn(12).float(), 100 * randn(12, seed=1).float()
    reward = WeightedSum([(lambda images, prompts: first, 1.0, "first"), (lambda images, prompts: second, 0.5, "second")])
    return samples_of(first=first, second=second), reward


def test_gdpo_gives_each_reward_its_weight_whatever_its_scale():
    samples, reward = scored()
    actual = advantages_of(samples, asked(multi_reward="gdpo"), reward)
    parts = torch.stack([samples.components["first"], samples.components["second"]])
    torch.testing.assert_close(actual, multi_reward_advantages(parts, torch.tensor([1.0, 0.5]), samples.groups))
    rescaled = samples_of(first=samples.components["first"], second=samples.components["second"] / 1000)
    torch.testing.assert_close(advantages_of(rescaled, asked(multi_reward="gdpo"), reward), actual, rtol=1e-2, atol=1e-2)
    correlation = torch.corrcoef(torch.stack([advantages_of(samples, asked(), reward), samples.components["second"]]))[0, 1]
    assert correlation > 0.8, "summed first, the larger scale drowns the other"


@pytest.mark.parametrize("flags", [{}, {"global_std": False}, {"std_ddof": 1}, {"global_std": False, "std_ddof": 1}])
def test_the_flags_choose_whose_std_divides(flags):
    samples, reward = scored()
    expected = group_advantages(samples.rewards, samples.groups, global_std=flags.get("global_std", True), ddof=flags.get("std_ddof", 0))
    assert torch.equal(advantages_of(samples, asked(**flags), reward), expected)
    assert not flags or not torch.allclose(expected, group_advantages(samples.rewards, samples.groups))


def test_the_others_can_be_the_baseline():
    samples, reward = scored()
    actual = advantages_of(samples, asked(baseline="leave_one_out", adv_clip_max=1e6), reward)
    others = (samples.rewards[:6].sum() - samples.rewards[:6]) / 5
    torch.testing.assert_close(actual[:6], samples.rewards[:6] - others)
    with pytest.raises(ValueError, match="leave out --baseline"):
        advantages_of(samples, asked(baseline="leave_one_out", multi_reward="gdpo"), reward)


def test_advantages_are_clamped_and_shaped_like_the_rewards():
    samples, reward = scored()
    assert advantages_of(samples, asked(adv_clip_max=0.5), reward).abs().max() == 0.5
    assert advantages_of(samples, asked(), reward, randn(12, 3).float()).shape == (12, 3)
    with pytest.raises(ValueError, match="gdpo needs a sum of rewards"):
        advantages_of(samples, asked(multi_reward="gdpo"), lambda images, prompts: None)


# --- runs --------------------------------------------------------------------------------------------------------------


def test_gdpo_leaves_out_what_the_sum_leaves_out():
    """A component that is infinite, or NaN with weight 0, has masked the sample's reward: it must not come back as an advantage."""
    samples, reward = scored()
    clean = advantages_of(samples, asked(multi_reward="gdpo"), reward)
    for broken in (float("inf"), float("-inf"), float("nan")):
        second = samples.components["second"].clone()
        second[3] = broken
        masked = samples_of(first=samples.components["first"], second=second)
        masked.rewards[3] = torch.nan
        advantages = advantages_of(masked, asked(multi_reward="gdpo"), reward)
        assert advantages[3] == 0 and advantages.isfinite().all()
        torch.testing.assert_close(advantages[6:], clean[6:], rtol=0.2, atol=0.2)
    masked, _ = scored()
    masked.rewards[0] = torch.nan
    assert advantages_of(masked, asked(multi_reward="gdpo"), reward)[0] == 0
