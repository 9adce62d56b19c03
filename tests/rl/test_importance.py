"""Ratios of two policies, and the surrogates that clip them."""

import math

import pytest
import torch

from diffusers_align.algorithms.d3po import d3po_loss
from diffusers_align.algorithms.diffusion_kto import kto_loss
from diffusers_align.algorithms.diffusion_nft import nft_loss
from diffusers_align.algorithms.dpok import dpok_loss
from diffusers_align.algorithms.reinforce import reinforce_loss
from diffusers_align.algorithms.reward_weighted_regression import reward_weighted_loss
from diffusers_align.algorithms.spo import spo_loss
from diffusers_align.rl import clamped_surrogate, clipped_surrogate, importance_ratio, true_ratio_bound


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def rewards_of(n: int, seed: int = 0) -> torch.Tensor:
    return 3 + 2 * torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ratios and their clipping


def test_importance_ratio_by_hand():
    log_prob, old = tensor(-10, -20, 5), tensor(-12, -20, 9)
    torch.testing.assert_close(importance_ratio(log_prob, old), tensor(math.exp(2), 1, math.exp(-4)))
    torch.testing.assert_close(importance_ratio(log_prob, old, 4), tensor(math.exp(0.5), 1, math.exp(-1)))


def test_importance_ratio_has_expectation_one_under_the_old_policy():
    old, new = torch.distributions.Normal(tensor(0), 1.0), torch.distributions.Normal(tensor(0.3), 1.0)
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ratio = importance_ratio(new.log_prob(x), old.log_prob(x))
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(len(x))


@pytest.mark.parametrize("clip_range", [1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("dimensions", [1, 1024, 16384])
def test_true_ratio_bound_is_what_a_ratio_at_the_clip_range_means(clip_range, dimensions):
    log_ratio = dimensions * math.log1p(clip_range)
    torch.testing.assert_close(importance_ratio(tensor(log_ratio), tensor(0), dimensions), tensor(1 + clip_range))
    assert true_ratio_bound(clip_range, dimensions) == pytest.approx((1 + clip_range) ** dimensions, rel=1e-9)
    assert true_ratio_bound(clip_range, dimensions) <= math.exp(clip_range * dimensions) * (1 + 1e-12)


def test_true_ratio_bound_does_not_overflow():
    assert true_ratio_bound(0.2, 10**9) == math.exp(700)


def test_clipped_surrogate_by_hand():
    ratio = tensor(0.5, 1, 1.5, 0.5, 1, 1.5)
    advantage = tensor(2, 2, 2, -2, -2, -2)
    # A > 0: no gain beyond 1.2, the full loss below 0.8; A < 0: the other way around
    torch.testing.assert_close(clipped_surrogate(ratio, advantage, 0.2), tensor(-1, -2, -2.4, 1.6, 2, 3))
    torch.testing.assert_close(clipped_surrogate(ratio, advantage, (0.1, 0.3)), tensor(-1, -2, -2.6, 1.8, 2, 3))


def test_clipped_surrogate_is_pessimistic_and_exact_inside_the_range():
    ratio, advantage = 1 + rewards_of(1000, 1) / 10, rewards_of(1000, 2) - 3
    loss, unclipped = clipped_surrogate(ratio, advantage, 0.2), -advantage * ratio
    assert (loss >= unclipped).all()
    inside = (ratio - 1).abs() < 0.2
    assert 0 < inside.sum() < 1000
    assert torch.equal(loss[inside], unclipped[inside])
    assert torch.equal(clipped_surrogate(ratio, advantage, 0.2), clipped_surrogate(ratio, advantage, (0.2, 0.2)))


def test_clamped_surrogate_by_hand():
    ratio = tensor(0.5, 1, 1.5, 0.5, 1, 1.5).requires_grad_()
    advantage = tensor(2, 2, 2, -2, -2, -2)
    loss = clamped_surrogate(ratio, advantage, 0.2)
    torch.testing.assert_close(loss.detach(), tensor(-1.6, -2, -2.4, 1.6, 2, 2.4))
    # no gradient beyond the clip, on either side and for either sign: PPO has one at the first and the last
    assert torch.autograd.grad(loss.sum(), ratio)[0].tolist() == [0, -2, 0, 0, 2, 0]
    assert torch.autograd.grad(clipped_surrogate(ratio, advantage, 0.2).sum(), ratio)[0].tolist() == [-2, -2, 0, 0, 2, 2]


@pytest.mark.parametrize("surrogate", [clipped_surrogate, clamped_surrogate])
def test_clip_ranges_of_each_sample_and_each_side(surrogate):
    ratio, advantage = 1 + (rewards_of(50, 1) - 3) / 5, rewards_of(50, 2) - 3
    low, high = rewards_of(50, 3).abs() / 20, rewards_of(50, 4).abs() / 20
    for clip_range in (low, (low, high), (0.1, high), (low, 0.1)):
        singles = []
        for i in range(50):
            pair = clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)
            singles.append(surrogate(ratio[i], advantage[i], tuple(float(c[i]) if torch.is_tensor(c) else c for c in pair)))
        torch.testing.assert_close(surrogate(ratio, advantage, clip_range), torch.stack(singles))
    assert torch.equal(surrogate(ratio, advantage, [0.1, 0.3]), surrogate(ratio, advantage, (0.1, 0.3)))


def test_numbers_of_other_samples_are_refused_and_those_that_all_steps_share_are_not():
    column, row, images = torch.zeros(3, 1), torch.zeros(3), torch.zeros(3, 1, 2, 2)
    for call in (
        lambda: importance_ratio(row, column),
        lambda: importance_ratio(column, row),
        lambda: importance_ratio(row, row[:2]),
        lambda: clipped_surrogate(row.exp(), column, 0.1),
        lambda: clamped_surrogate(row.exp(), column, 0.1),
        lambda: reinforce_loss(row, column),
        lambda: reinforce_loss(column, row),
        lambda: dpok_loss(row, row, row, column, per_dim=1),
        lambda: d3po_loss(row, row, column, row, per_dim=1),
        lambda: spo_loss(row, row[:2], row, row, per_dim=1),
        lambda: nft_loss(images, images, images, column),
        lambda: reward_weighted_loss(row, column),
        lambda: reward_weighted_loss(row, row, column),
        lambda: kto_loss(row, row, column, 0.0, beta=1.0),
    ):
        with pytest.raises(ValueError, match="does not go with .* one number a sample"):
            call()
    assert clipped_surrogate(torch.ones(3, 4), column, 0.1).shape == (3, 4)
    assert importance_ratio(row, torch.tensor(0.0)).shape == (3,)
