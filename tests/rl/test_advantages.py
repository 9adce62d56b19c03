"""Advantages of rewards, over batches, groups and prompts: by hand and against numpy."""

import math

import numpy as np
import pytest
import torch

from diffusers_align.rl import PromptStatistics, batch_advantages, group_advantages, leave_one_out_advantages, multi_reward_advantages

NAN = float("nan")


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def rewards_of(n: int, seed: int = 0) -> torch.Tensor:
    return 3 + 2 * torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# advantages over a batch


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("eps", [1e-8, 0.5])
def test_batch_advantages_are_numpys(ddof, eps):
    rewards = rewards_of(11)
    values = rewards.numpy()
    expected = (values - values.mean()) / (values.std(ddof=ddof) + eps)
    np.testing.assert_allclose(batch_advantages(rewards, eps=eps, ddof=ddof).numpy(), expected, rtol=1e-12)


def test_batch_advantages_by_hand():
    # mean 2, squared deviations 1 + 0 + 1: std is sqrt(2/3), or 1 with one degree of freedom taken off
    rewards = tensor(1, 2, 3)
    torch.testing.assert_close(batch_advantages(rewards, eps=0), tensor(-math.sqrt(1.5), 0, math.sqrt(1.5)))
    torch.testing.assert_close(batch_advantages(rewards, eps=0, ddof=1), tensor(-1, 0, 1))
    torch.testing.assert_close(batch_advantages(rewards, eps=1, ddof=1), tensor(-0.5, 0, 0.5))


def test_rewards_that_could_not_be_scored_enter_no_statistic():
    rewards = tensor(1, NAN, 2, 3, NAN)
    expected = torch.zeros_like(rewards)
    expected[[0, 2, 3]] = batch_advantages(tensor(1, 2, 3))
    torch.testing.assert_close(batch_advantages(rewards), expected)


@pytest.mark.parametrize("rewards", [tensor(), tensor(5), tensor(NAN), tensor(NAN, NAN), tensor(NAN, 5)])
@pytest.mark.parametrize("ddof", [0, 1])
def test_too_few_rewards_give_no_signal(rewards, ddof):
    torch.testing.assert_close(batch_advantages(rewards, ddof=ddof), torch.zeros_like(rewards), rtol=0, atol=0)


@pytest.mark.parametrize("value", [0.1, 0.3, 5.3, -7.77])
@pytest.mark.parametrize("count", [3, 7, 24, 48])
def test_equal_rewards_have_exactly_no_advantage(value, count):
    # In float32 the mean of equal numbers may differ from them by a rounding error, which a small eps would blow up.
    rewards, one_group = torch.full((count,), value), torch.zeros(count, dtype=torch.long)
    assert batch_advantages(rewards).abs().max() == 0
    assert group_advantages(rewards, one_group, global_std=True).abs().max() == 0
    assert group_advantages(rewards, one_group, global_std=False).abs().max() == 0
    assert PromptStatistics(min_count=1).update(["a cat"] * count, rewards).abs().max() == 0
    assert PromptStatistics(buffer_size=count + 1, min_count=count + 1).update(["a cat"] * count, rewards).abs().max() == 0


# advantages within groups


@pytest.mark.parametrize("global_std", [True, False])
@pytest.mark.parametrize("ddof", [0, 1])
def test_group_advantages_are_numpys(global_std, ddof):
    rewards, groups = rewards_of(12), torch.tensor([5, 0, 5, 9, 0, 9, 5, 0, 9, 0, 0, 5])
    values, expected = rewards.numpy(), np.zeros(12)
    for group in (0, 5, 9):
        members = values[groups.numpy() == group]
        scale = values.std(ddof=ddof) if global_std else members.std(ddof=ddof)
        expected[groups.numpy() == group] = (members - members.mean()) / (scale + 1e-4)
    np.testing.assert_allclose(group_advantages(rewards, groups, global_std=global_std, ddof=ddof).numpy(), expected, rtol=1e-12)


def test_group_advantages_by_hand():
    # Two groups: {0, 2} with std 1 and {10, 14} with std 2; all four about their mean 6.5: squares 42.25 + 20.25 + 12.25 + 56.25.
    rewards, groups = tensor(0, 10, 2, 14), torch.tensor([0, 1, 0, 1])
    torch.testing.assert_close(group_advantages(rewards, groups, global_std=False, eps=0), tensor(-1, -1, 1, 1))
    torch.testing.assert_close(group_advantages(rewards, groups, eps=0), tensor(-1, -2, 1, 2) / math.sqrt(131 / 4))
    torch.testing.assert_close(group_advantages(rewards, groups, global_std=False, eps=1), tensor(-1 / 2, -2 / 3, 1 / 2, 2 / 3))


@pytest.mark.parametrize("global_std", [True, False])
def test_group_advantages_sum_to_zero_in_each_group(global_std):
    rewards, groups = rewards_of(24), torch.arange(24) % 4
    advantages = group_advantages(rewards, groups, global_std=global_std)
    for group in range(4):
        assert advantages[groups == group].sum().abs() < 1e-12


@pytest.mark.parametrize("global_std", [True, False])
@pytest.mark.parametrize("ddof", [0, 1])
def test_a_group_of_one_and_a_group_of_equals_have_no_signal(global_std, ddof):
    rewards, groups = tensor(7, 1, 1, 1, 0, 4), torch.tensor([0, 1, 1, 1, 2, 2])
    advantages = group_advantages(rewards, groups, global_std=global_std, ddof=ddof)
    assert advantages[:4].abs().max() == 0
    assert advantages[4] < 0 < advantages[5]


@pytest.mark.parametrize("global_std", [True, False])
def test_rewards_that_could_not_be_scored_leave_their_group(global_std):
    rewards, groups = tensor(0, NAN, 2, 10, 14, NAN), torch.tensor([0, 0, 0, 1, 1, 2])
    valid = torch.tensor([0, 2, 3, 4])
    expected = torch.zeros_like(rewards)
    expected[valid] = group_advantages(rewards[valid], groups[valid], global_std=global_std)
    torch.testing.assert_close(group_advantages(rewards, groups, global_std=global_std), expected)


def test_without_normalisation_advantages_are_deviations_from_the_groups_mean():
    rewards, groups = tensor(0, 10, 2, 14, NAN), torch.tensor([0, 1, 0, 1, 1])
    assert group_advantages(rewards, groups, normalise=False).tolist() == [-1, -2, 1, 2, 0]


@pytest.mark.parametrize("flags", [{"global_std": True}, {"global_std": False, "ddof": 1}, {"normalise": False}, {"zero_std": "drop"}])
def test_rewards_of_each_step_are_compared_at_that_step(flags):
    rewards, groups = rewards_of(12 * 5).view(12, 5), torch.arange(12) % 3
    rewards[4, 1] = rewards[7, 3] = NAN
    rewards[groups == 2, 2] = 1.0
    steps = [group_advantages(column, groups, **flags) for column in rewards.T]
    torch.testing.assert_close(group_advantages(rewards, groups, **flags), torch.stack(steps, 1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(batch_advantages(rewards), torch.stack([batch_advantages(column) for column in rewards.T], 1), rtol=1e-12, atol=1e-12)


def test_groups_without_signal_are_kept_in_the_mean_or_dropped_from_it():
    # one of group 0 could not be scored, group 1 is all equal, group 2 has one reward that could be: 3 of 9 samples are left
    rewards, groups = tensor(0, 1, 2, 5, 5, 5, 3, NAN, NAN), torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 0])
    kept, dropped = (group_advantages(rewards, groups, zero_std=choice) for choice in ("keep", "drop"))
    assert torch.equal(kept, group_advantages(rewards, groups)) and kept[3:].abs().max() == 0
    torch.testing.assert_close(dropped, kept * 9 / 3)
    without = group_advantages(rewards[:3], groups[:3], normalise=False)
    everything = group_advantages(rewards, groups, normalise=False, zero_std="drop")
    torch.testing.assert_close(everything.abs().mean(), without.abs().mean())
    equal = torch.full((48,), 5.3, dtype=torch.float64)
    assert group_advantages(equal, torch.arange(48) % 4, zero_std="drop").abs().max() < 1e-9
    with pytest.raises(ValueError, match="'zero'"):
        group_advantages(rewards, groups, zero_std="zero")


def test_leave_one_out_by_hand():
    rewards, groups = tensor(1, 2, 6, 7, 3, NAN, 5), torch.tensor([0, 0, 0, 1, 2, 2, 2])
    assert leave_one_out_advantages(rewards, groups).tolist() == [1 - 4, 2 - 3.5, 6 - 1.5, 0, 3 - 5, 0, 5 - 3]
    assert torch.equal(leave_one_out_advantages(rewards[:, None].expand(-1, 2), groups)[:, 1], leave_one_out_advantages(rewards, groups))


def test_leave_one_out_is_unbiased_and_the_groups_mean_is_not():
    """Reward x of a Gaussian: the gradient of its mean with respect to the Gaussian's mean is 1."""
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores, groups = x, torch.arange(len(x)) // 100_000
    pairs = x.view(-1, 2)  # groups of two, all at once: each sample against the other
    assert (pairs * (pairs - pairs.flip(1))).mean() == pytest.approx(1, abs=0.02)
    assert (pairs * (pairs - pairs.mean(1, keepdim=True))).mean() == pytest.approx(0.5, abs=0.02)
    assert (scores * leave_one_out_advantages(x, groups)).mean() == pytest.approx(1, abs=0.02)
    pair = leave_one_out_advantages(pairs[0], torch.zeros(2))
    torch.testing.assert_close(pair, pairs[0] - pairs[0].flip(0))


# several rewards


def test_each_reward_is_normalised_in_its_group_before_they_are_summed():
    components, groups = torch.stack([rewards_of(12), 1000 * rewards_of(12, 1)]), torch.arange(12) % 3
    first, second = (group_advantages(c, groups, global_std=False) for c in components)
    advantages = multi_reward_advantages(components, tensor(1, 0.5), groups)
    torch.testing.assert_close(advantages, batch_advantages(first + 0.5 * second, eps=1e-4))
    # no reward drowns the other by its scale
    torch.testing.assert_close(multi_reward_advantages(components * tensor(10, 0.01)[:, None], tensor(1, 0.5), groups), advantages, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scale", [1e3, 1.0, 1e-3, 1e-6, 1e-9])
def test_a_reward_has_the_same_say_whatever_its_scale(scale):
    """Two rewards of weight 1 that have nothing to do with each other."""
    a, b, groups = tensor(1, -1, 1, -1), tensor(1, 1, -1, -1), torch.zeros(4)
    advantages = multi_reward_advantages(torch.stack([a, scale * b]), tensor(1, 1), groups)
    assert (advantages * b).mean() / (advantages * a).mean() == pytest.approx(1, rel=0.011)
    equal = multi_reward_advantages(torch.stack([a, torch.full_like(a, scale)]), tensor(1, 1), groups)
    torch.testing.assert_close(equal, multi_reward_advantages(a[None], tensor(1), groups), rtol=1e-3, atol=0.0)


def test_rounding_is_no_reward():
    """The last digits of a reward that is 1 for all."""
    a, groups = rewards_of(16), torch.zeros(16)
    b = 1 + 6e-8 * torch.arange(16).remainder(2).double()
    both = multi_reward_advantages(torch.stack([a, b]), tensor(1, 1), groups)
    torch.testing.assert_close(both, multi_reward_advantages(a[None], tensor(1), groups), rtol=0, atol=5e-3)


def test_one_reward_that_could_not_be_scored_masks_its_sample_alone():
    components, groups, weights = torch.stack([rewards_of(12), rewards_of(12, 1)]), torch.arange(12) % 3, tensor(1, 2)
    others = torch.arange(12) != 5
    expected = multi_reward_advantages(components[:, others], weights, groups[others])
    components[1, 5] = NAN
    advantages = multi_reward_advantages(components, weights, groups)
    assert advantages[5] == 0
    torch.testing.assert_close(advantages[others], expected, rtol=1e-12, atol=1e-12)
    watched = torch.cat([components[:1], torch.full((1, 12), NAN, dtype=torch.float64)])
    assert torch.equal(multi_reward_advantages(watched, tensor(1, 0), groups), multi_reward_advantages(components[:1], tensor(1), groups))


# statistics of each prompt


def test_a_prompt_borrows_the_batchs_statistics_until_it_was_seen_often_enough():
    statistics = PromptStatistics(min_count=3, eps=0)
    torch.testing.assert_close(statistics.update(["a", "a", "b"], tensor(1, 2, 9)), batch_advantages(tensor(1, 2, 9), eps=0))
    # now a has been seen 3 times: 1, 2, 6 with mean 3 and variance 14/3; b twice
    advantages = statistics.update(["a", "b"], tensor(6, 10))
    torch.testing.assert_close(advantages, tensor(3 / math.sqrt(14 / 3), 1))


def test_prompt_statistics_add_eps_to_the_deviation():
    statistics = PromptStatistics(min_count=1, eps=0.5)
    torch.testing.assert_close(statistics.update(["a", "a"], tensor(0, 2)), tensor(-1, 1) / 1.5)


def test_prompt_statistics_may_be_a_baseline_alone():
    statistics = PromptStatistics(min_count=2, normalise=False)
    assert statistics.update(["a", "a", "b"], tensor(0, 4, 11)).tolist() == [-2, 2, 11 - 5]


def test_prompt_statistics_keep_the_latest_rewards_only():
    statistics = PromptStatistics(buffer_size=2, min_count=1, eps=0)
    statistics.update(["a"] * 3, tensor(100, 1, 3))
    assert statistics.state_dict() == {"a": [1, 3]}
    # 5 pushes 1 out: mean of 3 and 5 is 4, std 1
    torch.testing.assert_close(statistics.update(["a"], tensor(5)), tensor(1))


def test_prompt_statistics_leave_out_what_could_not_be_scored():
    statistics = PromptStatistics(min_count=1, eps=0)
    advantages = statistics.update(["a", "a", "a", "b"], tensor(0, NAN, 2, NAN))
    torch.testing.assert_close(advantages, tensor(-1, 0, 1, 0))
    assert statistics.state_dict() == {"a": [0, 2]}


def test_restored_prompt_statistics_continue_identically():
    def batch(seed):
        generator = torch.Generator().manual_seed(seed)
        return [f"prompt {i}" for i in torch.randint(5, (12,), generator=generator).tolist()], torch.randn(12, generator=generator)

    uninterrupted, before = PromptStatistics(8, 4), PromptStatistics(8, 4)
    for seed in range(3):
        uninterrupted.update(*batch(seed))
        before.update(*batch(seed))
    state = before.state_dict()
    after = PromptStatistics(8, 4)
    after.load_state_dict(state)
    before.update(*batch(99))  # a saved state is a copy
    for seed in range(3, 9):
        assert torch.equal(uninterrupted.update(*batch(seed)), after.update(*batch(seed)))
    assert uninterrupted.state_dict() == after.state_dict()
    assert max(map(len, after.state_dict().values())) == 8


def test_a_buffer_that_never_holds_enough_is_refused():
    with pytest.raises(ValueError, match="buffer_size 8 never holds the 16 rewards of min_count"):
        PromptStatistics(8, 16)
