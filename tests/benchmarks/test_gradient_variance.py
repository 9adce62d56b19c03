"""The comparison of gradient estimators: what a cosine of two halves says, and which advantages are compared."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks.gradient_variance import LAMBDAS, REFERENCE, cosines, estimators, with_error


def test_the_cosine_is_the_share_of_signal():
    """Gradients of prompts with signal s and noise n in P dimensions: halves of M/2 have a cosine near s^2 / (s^2 + 2 n^2 P / M)."""
    generator, signal = torch.Generator().manual_seed(0), torch.zeros(400)
    signal[0] = 1.0
    clean = signal.expand(64, -1)
    assert cosines(clean, clean) == pytest.approx(1.0)
    noisy, more = (clean + scale * torch.randn(64, 400, generator=generator) for scale in (0.2, 0.6))
    expected = [1 / (1 + scale**2 * 400 / 32) for scale in (0.2, 0.6)]
    for gradients, share in zip((noisy, more), expected):
        cosine, error = with_error(gradients, gradients)
        assert cosine == pytest.approx(share, abs=0.08) and 0.0 < error < 0.1
    # Of two estimators without bias the geometric mean; what is wrong in one of them alone lowers it.
    assert cosines(noisy, more) == pytest.approx((expected[0] * expected[1]) ** 0.5, abs=0.08)
    wrong = noisy + 3 * signal.roll(1)
    assert cosines(wrong, wrong) > 0.8 and cosines(wrong, more) < 0.25


def test_the_advantages_that_are_compared():
    generator = torch.Generator().manual_seed(0)
    rewards, gains = torch.randn(4, generator=generator), torch.randn(4, 3, generator=generator)
    drawn = SimpleNamespace(steps=[0, 1, 2], rewards=rewards, gains=gains, groups=torch.tensor([0, 0, 1, 1]))
    of_reward, of_gains = torch.randn(4, 3, generator=generator), torch.randn(4, 3, generator=generator)
    found = estimators(drawn, of_reward, of_gains)
    assert all(advantages.shape == (4, 3) for advantages in found.values()) and len(LAMBDAS) == 4
    torch.testing.assert_close(found["gains to go"][:, 0], gains.sum(1))
    torch.testing.assert_close(found["group's mean"][0], ((rewards[0] - rewards[1]) / 2).expand(3))
    torch.testing.assert_close(found[REFERENCE], rewards[:, None] - of_reward)
    torch.testing.assert_close(found["GAE of the reward, 1"], found[REFERENCE])
    torch.testing.assert_close(found["GAE of gains, 1"], found["gains to go"] - of_gains)
    torch.testing.assert_close(found["GAE of gains, 0"][:, 0], gains[:, 0] + of_gains[:, 1] - of_gains[:, 0])
