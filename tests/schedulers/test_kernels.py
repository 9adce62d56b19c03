"""Data x_0 ~ N(m, s^2), for which the exact velocity is linear in the state: the moments of a whole chain follow by recursion."""

import math

import numpy as np
import pytest
import torch
from marginals import MEAN, VARIANCE, order, run_chain

from diffusers_align import FlowMatchSDEScheduler

NOISE = {"flow_grpo": 0.7, "dance_grpo": 0.3, "memoryless": 1.0, "memoryless_em": 1.0, "cps": 0.8}
STEPS = (160, 320, 640, 1280)


def velocity(sigma: float, data_variance: float) -> tuple[float, float]:
    """Slope and offset of E[eps - x_0 | x_sigma = x]."""
    slope = (sigma - (1 - sigma) * data_variance) / ((1 - sigma) ** 2 * data_variance + sigma**2)
    return slope, -MEAN * (1 + slope * (1 - sigma))


def flow_chain(sde_type, shift, steps, start=None, noise_level=None, ode=False, data_variance=VARIANCE):
    """Uniform sigmas from `start` to 0 before the shift, or the stock schedule if `start` is None."""
    scheduler = FlowMatchSDEScheduler(shift=shift, sde_type=sde_type, noise_level=NOISE[sde_type] if noise_level is None else noise_level)
    scheduler.deterministic = ode
    scheduler.set_timesteps(steps, sigmas=None if start is None else np.linspace(start, start / steps, steps).tolist())
    sigmas = scheduler.sigmas.tolist()

    def affine(k):
        kernel, (slope, offset) = scheduler.kernel(k), velocity(sigmas[k], data_variance)
        return kernel.x_weight + kernel.v_weight * slope, kernel.v_weight * offset, kernel.std

    mean, variance = (1 - sigmas[0]) * MEAN, (1 - sigmas[0]) ** 2 * data_variance + sigmas[0] ** 2
    return run_chain(mean, variance, (affine(k) for k in range(steps)))


def assert_first_order(steps, errors, what: str):
    measured = order(steps, errors)
    assert 0.9 < measured < 1.1, f"{what}: order {measured:.2f}, errors {errors}"


@pytest.mark.parametrize("sigma", [1.0, 0.6, 0.05])
def test_closed_form_velocity_is_the_conditional_expectation(sigma):
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(400_000, generator=generator, dtype=torch.float64) for _ in range(2))
    clean = MEAN + math.sqrt(VARIANCE) * clean
    x, v = (1 - sigma) * clean + sigma * noise, noise - clean
    slope = ((x - x.mean()) * (v - v.mean())).mean() / x.var()
    expected_slope, offset = velocity(sigma, VARIANCE)
    assert slope == pytest.approx(expected_slope, abs=0.02)
    assert v.mean() - slope * x.mean() == pytest.approx(offset, abs=0.02)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("sde_type", ["dance_grpo", "memoryless", "memoryless_em"])
def test_marginals_converge_with_order_one(sde_type, shift):
    chains = [flow_chain(sde_type, shift, steps, start=1.0) for steps in STEPS]
    assert_first_order(STEPS, [c[1] - VARIANCE for c in chains], f"{sde_type}, shift {shift}, variance")
    mean_errors = [c[0] - MEAN for c in chains]
    if sde_type == "memoryless_em":
        assert_first_order(STEPS, mean_errors, f"{sde_type}, shift {shift}, mean")
    else:
        assert max(map(abs, mean_errors)) < 1e-12


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("sde_type", ["dance_grpo", "memoryless", "memoryless_em"])
def test_error_falls_on_the_stock_schedule(sde_type, shift):
    errors = [abs(flow_chain(sde_type, shift, steps)[1] - VARIANCE) for steps in (20, 40, 80, 160)]
    assert 0.7 < order((20, 40, 80, 160), errors) < 1.1, f"order {order((20, 40, 80, 160), errors):.2f}, errors {errors}"
    assert errors[-1] < 0.025


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_grpo_has_order_one_away_from_its_singular_start(shift):
    chains = [flow_chain("flow_grpo", shift, steps, start=0.8) for steps in STEPS]
    assert_first_order(STEPS, [c[1] - VARIANCE for c in chains], f"shift {shift}, variance")
    assert max(abs(c[0] - MEAN) for c in chains) < 1e-12


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_grpo_converges_from_pure_noise_too(shift):
    errors = [abs(flow_chain("flow_grpo", shift, steps)[1] - VARIANCE) for steps in (10, 40, 160)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.005, errors


@pytest.mark.parametrize("noise_level", [0.5, 0.7, 1.0])
def test_flow_grpo_forgets_its_start_at_the_rate_of_its_singularity(noise_level):
    """Near sigma = 1 the pull is a^2 / 2 a unit of log(1 - sigma), and the first step leaves 1 / K: corr(x_0, x_T) ~ K^(-a^2 / 2)."""
    steps = (640, 2560, 10240)
    measured = order(steps, [flow_chain("flow_grpo", 1.0, k, start=1.0, noise_level=noise_level)[2] for k in steps])
    assert measured == pytest.approx(noise_level**2 / 2, rel=0.02)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_cps_does_not_converge(shift):
    """Its marginals are not the data's, however many steps."""
    errors = {steps: VARIANCE - flow_chain("cps", shift, steps)[1] for steps in (40, 160, 1280)}
    assert errors[160] > 0.09 and errors[1280] > 0.085, errors
    assert errors[160] > 0.8 * errors[40], errors
    assert abs(flow_chain("cps", shift, 160)[0] - MEAN) < 1e-12


@pytest.mark.parametrize(
    ("steps", "ode", "flow", "dance", "cps"),
    [(10, 0.130, 0.178, 0.143, 0.095), (40, 0.217, 0.230, 0.220, 0.138)],
)
def test_variances_of_few_steps_match_the_published_kernels(steps, ode, flow, dance, cps):
    """The reference values were sampled, hence the tolerance, on the stock schedule with shift 3."""
    assert flow_chain("flow_grpo", 3.0, steps, ode=True)[1] == pytest.approx(ode, abs=1.5e-3)
    assert flow_chain("flow_grpo", 3.0, steps)[1] == pytest.approx(flow, abs=1.5e-3)
    assert flow_chain("dance_grpo", 3.0, steps)[1] == pytest.approx(dance, abs=1.5e-3)
    assert flow_chain("cps", 3.0, steps)[1] == pytest.approx(cps, abs=1.5e-3)


@pytest.mark.parametrize("start", [None, 1.0])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [2, 10, 40])
def test_memoryless_forgets_its_start_at_any_number_of_steps(steps, shift, start):
    assert abs(flow_chain("memoryless", shift, steps, start)[2]) < 1e-12


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_memoryless_em_forgets_its_start_up_to_the_step_size(shift):
    memory = [abs(flow_chain("memoryless_em", shift, steps)[2]) for steps in (20, 40, 80)]
    assert 1e-6 < memory[2] < memory[1] < memory[0] < 2e-3, memory


def test_other_kernels_remember_their_start():
    assert flow_chain("dance_grpo", 3.0, 20)[2] > 0.8
    assert flow_chain("flow_grpo", 3.0, 20)[2] > 0.1
    assert flow_chain("flow_grpo", 3.0, 20, ode=True)[2] == pytest.approx(1)
