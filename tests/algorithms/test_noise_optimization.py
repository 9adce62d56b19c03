"""Noise optimisation: its regularisers by hand, and its ascent where the optimum is known."""

import math

import pytest
import torch

from diffusers_align.algorithms import noise_optimization
from diffusers_align.algorithms.noise_optimization import NoiseOptimization, ascend, clipped, concentration_regularizer, norm_regularizer, settings


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the regularisers ------------------------------------------------------------------------------------------------------


def test_the_norm_regularizer_by_hand():
    noise = torch.tensor([[[1.0, 1.0], [1.0, 1.0]], [[3.0, 0.0], [0.0, 4.0]]], dtype=torch.float64)
    torch.testing.assert_close(norm_regularizer(noise), torch.tensor([2 - 3 * math.log(2), 12.5 - 3 * math.log(5)], dtype=torch.float64))


def test_the_norm_regularizer_is_the_norms_density():
    noise = torch.linspace(0.5, 2, 9, dtype=torch.float64)[:, None] * normal(1, 12)
    norm = noise.norm(dim=1)
    density = torch.distributions.Chi2(12.0).log_prob(norm.square()) + (2 * norm).log()
    offsets = norm_regularizer(noise) + density
    torch.testing.assert_close(offsets, offsets[:1].expand(9), rtol=1e-6, atol=0)


def test_half_precision_does_not_overflow():
    assert norm_regularizer(torch.full((1, 4096), 8.0, dtype=torch.float16)).isfinite().all()


def test_the_concentration_regularizer_by_hand():
    """m = 25 blocks of k = 4: zeros miss the second moments alone, ones the mean as well."""
    zeros, ones = torch.zeros(100, dtype=torch.float64), torch.ones(100, dtype=torch.float64)
    spread = [25 * max(math.sqrt(1 + excess) - 1 - math.sqrt(4 / 25), 0) ** 2 / 2 - math.log(2) for excess in (1.0, 3.0)]
    expected = torch.tensor([max(spread[0], 0), 25 / 2 - math.log(2) + spread[1]], dtype=torch.float64)
    found = concentration_regularizer(torch.stack([zeros, ones]), torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, 2 * expected)  # all orders are alike


def test_the_concentration_regularizer_knows_noise_from_what_has_its_norm():
    noise = normal(4, 400)
    noise[1] = noise[1].sort().values  # in the given order, neighbours are alike
    noise[2] = noise[2].abs()
    noise[3, :4] *= 10
    found = concentration_regularizer(noise, torch.Generator().manual_seed(0))
    assert found[0] < 0.1 and (found[1:] > 1).all()
    torch.testing.assert_close(concentration_regularizer(noise[2:3], torch.Generator().manual_seed(0))[0], found[2])


def test_clipping_is_of_each_sample():
    gradient = torch.tensor([[3.0, 4.0], [0.03, 0.04], [0.0, 0.0]])
    torch.testing.assert_close(clipped(gradient, 0.5), torch.tensor([[0.3, 0.4], [0.03, 0.04], [0.0, 0.0]]))
    assert torch.equal(clipped(gradient, math.inf), gradient)


# --- the ascent ------------------------------------------------------------------------------------------------------------


def linear(slope):
    """The reward c . z, as a linear flow's of a linear reward."""
    return lambda z, gradient: (z @ slope, slope.expand_as(z))


@pytest.mark.parametrize("optimizer, options", [("sgd", {"learning_rate": 0.3}), ("adam", {"learning_rate": 0.05, "max_grad_norm": 1.0}), ("lbfgs", {})])
def test_a_linear_reward_is_climbed_to_where_the_regulariser_holds(optimizer, options):
    """lambda c - rho z + rho (D - 1) z / |z|^2 = 0 along c."""
    slope, rho, scale = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), 2.0, 3.0
    pull = scale * slope.norm() / rho
    norm = (pull + (pull**2 + 8).sqrt()) / 2
    chosen = settings(optimizer, num_iterations=400, regularizer="norm", regularization=rho, **options)
    found = ascend(linear(slope), normal(1, 3), chosen, reward_scale=scale)
    last = found.history[-1]
    torch.testing.assert_close(last[0], slope @ (norm * slope / slope.norm()), rtol=2e-2 if optimizer != "lbfgs" else 1e-6, atol=0)


def test_the_regulariser_pulls_the_norm_to_the_root_of_the_dimension():
    start = 3 * normal(2, 50)
    still = linear(torch.zeros(50, dtype=torch.float64))
    chosen = settings("sgd", num_iterations=300, learning_rate=0.05, max_grad_norm=10.0, regularization=1.0)
    norms = []
    ascend(lambda z, gradient: (norms.append(z.norm(dim=1)), still(z, gradient))[1], start, chosen)
    torch.testing.assert_close(norms[-1], torch.full((2,), 49.0, dtype=torch.float64).sqrt(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_samples_ascent_does_not_depend_on_the_batch(optimizer):
    slope, start = normal(8, seed=2), normal(3, 8)

    def evaluate(z, gradient):
        return (z @ slope).sin(), (z @ slope).cos()[:, None] * slope

    chosen = settings(optimizer, num_iterations=7)
    together = ascend(evaluate, start, chosen)
    for row in range(3):
        alone = ascend(evaluate, start[row : row + 1], chosen)
        torch.testing.assert_close(alone.noise[0], together.noise[row], rtol=0, atol=1e-12)


def test_the_best_iterate_is_kept_beside_the_history():
    def evaluate(z, gradient):
        return -z.square().sum(1), -2 * z

    chosen = NoiseOptimization("sgd", 12, 0.6)  # overshoots
    better = []
    found = ascend(evaluate, normal(2, 3), chosen, on_better=better.append)
    history = torch.stack(found.history, 1)
    assert history.shape == (2, 13) and torch.equal(found.rewards, history.max(1).values)
    torch.testing.assert_close(evaluate(found.noise, False)[0], found.rewards)
    assert (history.diff(dim=1) < 0).any()
    assert torch.equal(torch.stack(better, 1), history == history.cummax(1).values)


def test_a_line_search_evaluates_each_noise_once():
    seen = []

    def evaluate(z, gradient):
        if gradient:
            assert not any(torch.equal(z, known) for known in seen)
            seen.append(z)
        return -(z**4).sum(1), -4 * z**3

    found = ascend(evaluate, normal(1, 3), settings("lbfgs", num_iterations=5))
    assert len(found.history) == 6 and found.rewards[0] > -0.1
    with pytest.raises(ValueError, match="one sample at a time"):
        ascend(evaluate, normal(2, 3), settings("lbfgs"))


@pytest.mark.parametrize("optimizer", ["sgd", "lbfgs"])
def test_what_is_not_finite_stops_its_sample_at_its_best(optimizer):
    def evaluate(z, gradient):
        rewards = torch.where(z[:, 0] > 1, torch.nan, z[:, 0])
        return rewards, torch.eye(2, dtype=z.dtype)[0].expand_as(z)

    start = torch.tensor([[0.5, 0.0], [-99.0, 0.0]], dtype=torch.float64)[: 1 if optimizer == "lbfgs" else 2]
    found = ascend(evaluate, start, settings(optimizer, num_iterations=9, learning_rate=3.0, regularization=0.0))
    history = torch.stack(found.history, 1)
    assert history.shape == (len(start), 10) and not found.running[0]
    assert history[0, -1].isnan() and 0.5 <= found.rewards[0] <= 1 and found.noise[0, 0] == found.rewards[0]
    if optimizer == "sgd":
        assert found.running[1] and history[1].isfinite().all()


def test_settings_that_do_not_fit_are_refused():
    wrong = {"regularizer 'l2'": {"regularizer": "l2"}, "num_iterations must be": {"num_iterations": -1}, "learning_rate must be": {"learning_rate": 0.0}}
    for match, options in wrong.items():
        with pytest.raises(ValueError, match=match):
            settings("sgd", **options)
    with pytest.raises(ValueError, match="Unknown optimizer 'newton'"):
        settings("newton")
    with pytest.raises(ValueError, match="leave max_grad_norm out"):
        settings("lbfgs", max_grad_norm=0.1)


# --- errors ----------------------------------------------------------------------------------------------------------------


def test_defaults_are_the_papers():
    reno, dno, d_flow = (noise_optimization.SETTINGS[name] for name in ("sgd", "adam", "lbfgs"))
    assert (reno.num_iterations, reno.learning_rate, reno.max_grad_norm, reno.regularization) == (50, 5.0, 0.1, 0.01)
    assert (dno.num_iterations, dno.learning_rate, dno.max_grad_norm, dno.regularizer) == (100, 0.01, 1.0, "concentration")
    assert d_flow.regularization == 0 and d_flow.max_grad_norm == math.inf
