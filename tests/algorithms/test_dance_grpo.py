"""DanceGRPO: its selection and its advantages."""

import pytest
import torch
from moved_policy import randn

from diffusers_align.algorithms.dance_grpo import best_and_worst
from diffusers_align.rl import group_advantages


def test_best_and_worst_keeps_both_ends_of_each_group():
    groups = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1])
    advantages = torch.tensor([3.0, -6, 1, -5, 2, -4, -1, 4, -2, 5, -3, 6])
    kept = best_and_worst(advantages, groups, 4)
    assert kept.tolist() == [4.5, -9, 0, -7.5, 3, 0, 0, 0, -3, 7.5, -4.5, 9]
    assert torch.equal(best_and_worst(advantages, groups, 6), advantages)


def test_best_and_worst_of_ties_and_bad_numbers():
    assert (best_and_worst(torch.zeros(8), torch.zeros(8, dtype=torch.long), 4) == 0).all()
    for keep in (0, 3, 10):
        with pytest.raises(ValueError, match="even, at least 2 and at most the group's size"):
            best_and_worst(torch.zeros(8), torch.zeros(8, dtype=torch.long), keep)


def test_dance_advantages_are_the_official_ones():
    rewards, groups = randn(24).float(), torch.arange(2).repeat_interleave(12)
    expected = torch.cat([(r - r.mean()) / (r.std() + 1e-8) for r in rewards.double().chunk(2)])  # torch's std: ddof 1
    torch.testing.assert_close(group_advantages(rewards, groups, global_std=False, eps=1e-8, ddof=1).double(), expected, rtol=1e-6, atol=1e-6)
