"""Preference flow matching: flows with closed forms, and couplings that keep prompts."""

import math

import pytest
import torch

from diffusers_align.algorithms.preference_flow_matching import COUPLINGS, SOLVERS, couple, interpolate, pfm_loss, transport, transport_plan


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the line and its loss -------------------------------------------------------------------------------------------------


def test_the_ends_of_the_line_are_the_data_exactly():
    y0, y1 = normal(3, 2, 4).float(), normal(3, 2, 4, seed=1).float() * 1e3
    assert torch.equal(interpolate(y0, y1, torch.zeros(3)), y0) and torch.equal(interpolate(y0, y1, torch.ones(3)), y1)


def test_each_sample_has_its_own_time_and_noise_is_added():
    y0, y1, noise = torch.zeros(2, 1, 3), torch.ones(2, 1, 3), torch.full((2, 1, 3), 2.0)
    point = interpolate(y0, y1, torch.tensor([0.25, 0.75]), sigma=0.5, noise=noise)
    assert torch.equal(point[:, 0, 0], torch.tensor([1.25, 1.75]))


def test_the_loss_is_the_mean_square_to_the_difference():
    y0, y1, velocity = normal(4, 2, 3), normal(4, 2, 3, seed=1), normal(4, 2, 3, seed=2)
    torch.testing.assert_close(pfm_loss(velocity, y0, y1), torch.stack([((velocity[i] - y1[i] + y0[i]) ** 2).sum() / 6 for i in range(4)]))
    assert torch.equal(pfm_loss(y1 - y0, y0, y1), torch.zeros(4, dtype=torch.float64))


# --- solvers against closed forms ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("iterations, strength", [(1, 1.0), (3, 1.0), (2, 0.5)])
def test_a_constant_field_shifts_by_passes_times_strength(solver, iterations, strength):
    y, shift = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, -4.0]])
    moved = transport(lambda t, y: shift, y, num_steps=1, solver=solver, iterations=iterations, strength=strength)
    torch.testing.assert_close(moved, y + iterations * strength * shift, rtol=0, atol=1e-6)
    if solver == "euler" and strength == 1:
        assert torch.equal(moved, y + iterations * shift)


# dy/dt = a y + b t: an exponential and a field that depends on time
def linear(t, y):
    return 1.3 * y + 0.7 * t


def linear_flow(y, t=1.0, a=1.3, b=0.7):
    return math.exp(a * t) * (y + b / a**2) - b / a * t - b / a**2


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2), ("rk4", 4)])
def test_solvers_converge_at_their_order(solver, order):
    y = normal(5, 2)
    errors = [(transport(linear, y, num_steps=n, solver=solver) - linear_flow(y)).abs().max() for n in (20, 40)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


def test_rk4_is_the_closed_form_also_part_of_the_way():
    y = normal(5, 2)
    for strength in (0.3, 1.0):
        assert (transport(linear, y, num_steps=50, solver="rk4", strength=strength) - linear_flow(y, strength)).abs().max() < 1e-6


@pytest.mark.parametrize("strength, iterations", [(1.0, 1), (0.6, 1), (1.0, 2)])
def test_the_reversed_flow_is_the_inverse(strength, iterations):
    y, how = normal(5, 2), {"num_steps": 10, "solver": "rk4", "strength": strength, "iterations": iterations}
    there = transport(linear, y, **how)
    assert (there - y).abs().max() > 0.1
    assert (transport(linear, there, **how, reverse=True) - y).abs().max() < 1e-4


def test_strength_0_is_the_identity_and_asks_nothing():
    y = normal(2, 3)
    assert transport(lambda t, y: pytest.fail("the field was evaluated"), y, strength=0.0) is y


def test_the_field_sees_the_times_of_the_solver():
    times, count = [], []
    transport(lambda t, y: times.append(t) or 0 * y, normal(1, 1), num_steps=2, solver="heun", strength=0.5, on_step=lambda: count.append(1))
    assert times == [0.0, 0.25, 0.25, 0.5] and len(count) == 2


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"solver": "dopri5"}, "euler, heun, rk4"),
        ({"strength": 1.5}, "iterations to go further"),
        ({"num_steps": 0}, "got 0 and 1"),
        ({"iterations": 0}, "10 and 0"),
    ],
)
def test_transport_refuses_what_makes_no_sense(flags, message):
    with pytest.raises(ValueError, match=message):
        transport(linear, normal(1, 1), **flags)


def gaussian_field(mean0, mean1, cov):
    """The exact field of jointly Gaussian (y0, y1) with covariance `cov` (2, 2): E[y1 - y0 | y_t]."""

    def field(t, y):
        weights = torch.tensor([1 - t, t], dtype=torch.float64)
        gain = (torch.tensor([-1.0, 1.0], dtype=torch.float64) @ cov @ weights) / (weights @ cov @ weights)
        return mean1 - mean0 + gain * (y - (1 - t) * mean0 - t * mean1)

    return field


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.99])
def test_gaussian_pairs_flow_along_the_monotone_map_whatever_their_coupling(correlation):
    cov = torch.tensor([[1.0, 2 * correlation], [2 * correlation, 4.0]], dtype=torch.float64)
    y = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    moved = transport(gaussian_field(0.5, 2.0, cov), y, num_steps=50, solver="rk4")
    torch.testing.assert_close(moved, 2.0 + 2 * (y - 0.5), rtol=0, atol=1e-4)


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_every_coupling_learns_the_monotone_map(coupling):
    """Losers and winners of pairs of normals: min and max. The field is fitted in bins of y_t at each time that the solver asks for."""
    both = normal(10_000, 2).sort(dim=1).values
    y0, y1 = both[:, :1], both[:, 1:]
    index = couple(coupling, y0, y1, [i // 50 for i in range(len(y0))], generator=torch.Generator().manual_seed(0))
    edges = torch.linspace(-3.5, 3.5, 71, dtype=torch.float64)

    def field(t, y):
        point = interpolate(y0, y1[index], torch.full((len(y0),), t))[:, 0]
        bins, velocity = torch.bucketize(point, edges), (y1[index] - y0)[:, 0]
        sums = torch.zeros(72, 2, dtype=torch.float64).index_add(0, bins, torch.stack([velocity, torch.ones_like(velocity)], 1))
        return (sums[:, 0] / sums[:, 1].clamp(min=1))[torch.bucketize(y[:, 0], edges)][:, None]

    where = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    moved = transport(field, y0.quantile(where)[:, None], num_steps=40, solver="euler")
    assert (moved[:, 0] - y1.quantile(where)).abs().max() < 0.1


# --- couplings -------------------------------------------------------------------------------------------------------------


def test_the_default_pairs_rows_and_the_others_stay_within_prompts():
    y0, y1, prompts = normal(60, 2), normal(60, 2, seed=1), [f"prompt {i % 4}" for i in range(60)]
    assert torch.equal(couple("paired", y0, y1), torch.arange(60))
    for coupling in ("independent", "ot"):
        index = couple(coupling, y0, y1, prompts, generator=torch.Generator().manual_seed(0))
        assert [prompts[i] for i in index.tolist()] == prompts and not torch.equal(index, torch.arange(60))


@pytest.mark.parametrize("coupling", ["independent", "ot"])
def test_without_prompts_only_the_pairs_themselves_are_kept(coupling):
    with pytest.raises(ValueError, match="those of other prompts"):
        couple(coupling, normal(4, 2), normal(4, 2))
    with pytest.raises(ValueError, match="of each of the 4 pairs"):
        couple(coupling, normal(4, 2), normal(4, 2), ["a"])


def test_transport_across_prompts_would_mix_them():
    """Two prompts that want opposite shifts of the same sources: one transport for both follows the distance, not the prompt."""
    y0, prompts = normal(200, 1), ["left", "right"] * 100
    y1 = y0 + torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat(100)[:, None]
    mixed = couple("ot", y0, y1, ["any"] * 200, generator=torch.Generator().manual_seed(0))
    assert sum(prompts[i] == prompt for i, prompt in zip(mixed.tolist(), prompts)) < 150
    kept = couple("ot", y0, y1, prompts, generator=torch.Generator().manual_seed(0))
    assert all(prompts[i] == prompt for i, prompt in zip(kept.tolist(), prompts))


def test_the_plan_is_the_assignment_of_least_cost():
    y0, target = normal(6, 2), torch.tensor([3, 1, 0, 5, 4, 2])
    y1 = (y0 + 0.01 * normal(6, 2, seed=1))[target.argsort()]
    assert torch.equal(transport_plan(y0, y1, regularization=0.01).argmax(1), target)
    plan = transport_plan(normal(30, 2), normal(30, 2, seed=1))
    torch.testing.assert_close(plan.sum(1), torch.ones(30, dtype=torch.float64))
    torch.testing.assert_close(plan.sum(0), torch.ones(30, dtype=torch.float64), atol=0.05, rtol=0)
    assert torch.equal(transport_plan(torch.zeros(2, 1), torch.zeros(2, 1)), torch.full((2, 2), 0.5, dtype=torch.float64)), "all the same: no division by 0"


def test_unknown_couplings_are_named():
    with pytest.raises(ValueError, match="paired, independent, ot"):
        couple("exact", normal(2, 2), normal(2, 2))
