"""What is logged of ratios: KL estimates, clipped shares, the effective sample size."""

import math

import pytest
import torch

from diffusers_align.rl import approximate_kl, clip_fractions, effective_sample_size, ratio_diagnostics


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def rewards_of(n: int, seed: int = 0) -> torch.Tensor:
    return 3 + 2 * torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# diagnostics


def test_diagnostics_of_an_exact_replay_are_zero():
    log_prob = rewards_of(8) * 1000
    names = ("ratio_error", "clip_fraction", "clip_low", "clip_high", "approx_kl")
    assert ratio_diagnostics(log_prob, log_prob.clone(), 1e-4, 1024) == dict.fromkeys(names, 0.0)


def test_diagnostics_by_hand():
    log_ratio = tensor(math.log(1.5), math.log(0.9), 0, math.log(0.7)).requires_grad_()
    expected = {"ratio_error": 0.5, "clip_fraction": 0.5, "clip_low": 0.25, "clip_high": 0.25}
    expected["approx_kl"] = (0.5 - 0.1 - 0.3 - math.log(1.5 * 0.9 * 0.7)) / 4
    for per_dim in (1, 10):
        assert ratio_diagnostics(log_ratio * per_dim, tensor(0, 0, 0, 0), 0.2, per_dim) == pytest.approx(expected)


def test_approx_kl_estimates_the_kl():
    old, new = torch.distributions.Normal(tensor(0), 1.0), torch.distributions.Normal(tensor(0.2), 1.0)
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kl = ratio_diagnostics(new.log_prob(x), old.log_prob(x), 0.2)["approx_kl"]
    assert kl == pytest.approx(0.2**2 / 2, rel=0.02)


def test_kl_estimators_by_hand_and_against_the_kl():
    log_ratio = tensor(math.log(2), math.log(0.5))
    assert approximate_kl(log_ratio, "k1") == pytest.approx(0)
    assert approximate_kl(log_ratio, "k2") == pytest.approx(math.log(2) ** 2 / 2)
    assert approximate_kl(log_ratio, "k3") == pytest.approx((1 - 0.5) / 2) == approximate_kl(log_ratio)
    old, new = torch.distributions.Normal(tensor(0), 1.0), torch.distributions.Normal(tensor(0.2), 1.0)
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for estimator in ("k1", "k2", "k3"):
        assert approximate_kl(new.log_prob(x) - old.log_prob(x), estimator) == pytest.approx(0.2**2 / 2, rel=0.05)
    with pytest.raises(ValueError, match="'k4'"):
        approximate_kl(log_ratio, "k4")


def test_clip_fractions_count_each_side():
    low, high = clip_fractions(tensor(0.5, 0.85, 1, 1.15, 1.5, 1.6), (0.2, 0.1))
    assert (low, high) == (pytest.approx(1 / 6), pytest.approx(3 / 6))


def test_effective_sample_size():
    assert effective_sample_size(torch.zeros(7)) == pytest.approx(7)
    assert effective_sample_size(torch.log(tensor(1, 2, 3))) == pytest.approx(36 / 14)
    # in log space: nothing overflows, and a common offset does not matter
    assert effective_sample_size(torch.log(tensor(1, 2, 3)) + 1e4) == pytest.approx(36 / 14)
    assert effective_sample_size(tensor(-1e4, 1e4, 0)) == pytest.approx(1)
    assert effective_sample_size(torch.zeros(2, 3)).tolist() == pytest.approx([3, 3])
