"""Adjoint Matching: exact optima of Gaussian chains and the paper's fixed point."""

import math
import random

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from diffusers_align import GaussianTransition
from diffusers_align.algorithms.adjoint_matching import (
    adjoint_matching_loss,
    control,
    lean_adjoints,
    loss_threshold,
    matched_steps,
    matching_diagnostics,
    pulled_back,
    smoothed_gradient,
    summary,
    terminal_adjoint,
    within,
)
from diffusers_align.forward_process import ForwardProcess
from diffusers_align.schedulers import sde_twin
from diffusers_align.schedulers.kernels import KERNELS
from diffusers_align.training.gradient.adjoints import describe_memory, schedule_memory

DATA_MEAN, DATA_STD, SCALE, SLOPE = 0.7, 0.6, 2.0, 0.5  # data N(m, s^2), lambda, r(x) = c x


def f64(value):
    return torch.tensor([[float(value)]], dtype=torch.float64)


# --- affine chains by the shipped schedulers ------------------------------------------------------------------------------


def exact_output(process, t, x):
    """What the perfect model of the data N(m, s^2) answers."""
    alpha, sigma = process.alpha(t).double(), process.sigma(t).double()
    gain = alpha * DATA_STD**2 / (alpha.square() * DATA_STD**2 + sigma.square())
    x0 = DATA_MEAN + gain * (x - alpha * DATA_MEAN)
    return process.target(x0, (x - alpha * x0) / sigma, t)


def probed(scheduler):
    """(slope, offset, std) of each step, from the scheduler's own kernel at x = 0 and x = 1."""
    process, found = ForwardProcess(scheduler), []
    for t in scheduler.timesteps:
        times = t.reshape(1)
        at_zero, at_one = (scheduler.transition(exact_output(process, times, f64(x)), t, f64(x)) for x in (0, 1))
        found.append((float(at_one.mean) - float(at_zero.mean), float(at_zero.mean), float(at_zero.std)))
    return found


def terminal(chain):
    """Mean and variance of x_K and its correlation with x_0 ~ N(0, 1), by recursion."""
    mean, variance, covariance = 0.0, 1.0, 1.0
    for slope, offset, std in chain:
        mean, variance, covariance = slope * mean + offset, slope**2 * variance + std**2, slope * covariance
    return mean, variance, covariance / variance**0.5


def matched(chain, pairing=1, sign=1.0):
    """The chain at the minimum of the loss for r = c x, found from the loss itself: it is quadratic in the mean."""
    slopes = torch.tensor([slope for slope, _, _ in chain], dtype=torch.float64)
    states = [f64(0.0)] * (len(chain) + 1)
    adjoints = lean_adjoints(states, lambda k, x: slopes[k] * x + chain[k][1], terminal_adjoint(f64(sign * SLOPE), SCALE))
    before = {k: pulled_back(lambda x: slopes[k] * x, states[k], adjoints[k]) for k in adjoints}
    out = []
    for k, (slope, offset, std) in enumerate(chain):
        if std > 0:
            mean = f64(offset).requires_grad_()
            loss = adjoint_matching_loss(mean, f64(offset), f64(std), (adjoints if pairing else before)[k])
            offset -= float(torch.autograd.grad(loss.sum(), mean)[0]) * std**2 / 2
        out.append((slope, offset, std))
    return out


def flow(number, sde_type="memoryless", shift=1.0):
    scheduler = sde_twin(FlowMatchEulerDiscreteScheduler(shift=shift), sde_type=sde_type, noise_level=1.0)
    scheduler.set_timesteps(number)
    return scheduler


def stable_diffusion(number):
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = sde_twin(DDIMScheduler(**betas, clip_sample=False, timestep_spacing="trailing"))
    scheduler.set_timesteps(number)
    return scheduler


@pytest.mark.parametrize("scheduler", [flow(10), flow(28, shift=3.0), flow(40), stable_diffusion(20), stable_diffusion(50)])
def test_the_minimum_of_the_loss_is_the_tilt_of_the_same_discrete_chain(scheduler):
    chain = probed(scheduler)
    mean, variance, memory = terminal(chain)
    tilted, tilted_variance, _ = terminal(matched(chain))
    assert tilted - mean == pytest.approx(SCALE * SLOPE * variance * (1 - memory**2), abs=1e-6)
    assert tilted_variance == variance
    # What would not notice a wrong pairing or sign is no test.
    assert abs(terminal(matched(chain, pairing=0))[0] - tilted) > 5e-3
    assert terminal(matched(chain, sign=-1.0))[0] < mean


@pytest.mark.parametrize("number, share", [(10, 0.315), (20, 0.151), (40, 0.073)])
def test_the_papers_pairing_misses_a_share_of_the_tilt(number, share):
    chain = probed(flow(number))
    mean, ours, theirs = (terminal(c)[0] for c in (chain, matched(chain), matched(chain, pairing=0)))
    assert (ours - theirs) / (ours - mean) == pytest.approx(share, abs=1e-3)


def test_memory_of_the_schedules():
    for scheduler in (flow(4), flow(10, shift=3.0), flow(40)):
        assert abs(terminal(probed(scheduler))[2]) < 1e-9 and abs(schedule_memory(scheduler)) < 1e-9
    assert 0.04 < terminal(probed(stable_diffusion(50)))[2] < 0.051
    # The ancestral chain is the noising chain in reverse, up to its variance: the correlation is the signal that is left at the end.
    diffusion = stable_diffusion(1000)
    assert schedule_memory(diffusion) == pytest.approx(float(diffusion.alphas_cumprod[-1]) ** 0.5, rel=1e-2)
    remembering = flow(10)
    remembering.deterministic = True
    assert schedule_memory(remembering) == pytest.approx(1) and 0.02 < schedule_memory(flow(10, "flow_grpo")) < 0.2
    assert "0.069" in describe_memory(diffusion) and "short by 0.5%" in describe_memory(diffusion)


# --- the paper's continuous formulas ---------------------------------------------------------------------------------------


def variance_at(time):
    return time**2 * DATA_STD**2 + (1 - time) ** 2


@pytest.mark.parametrize("quadratic", [False, True])
def test_the_lean_adjoint_is_the_closed_form(quadratic):
    """a(t) = a(1) s^2 t / var_t for Gaussian data, whatever the reward: O(1/K) at K steps."""
    final, errors = 1.3, []
    a_1 = SCALE * (final - 0.2) if quadratic else -SCALE * SLOPE
    for number in (100, 200):
        chain = probed(flow(number))
        adjoints = lean_adjoints([f64(0.0)] * (number + 1), lambda k, x: chain[k][0] * x, f64(a_1))
        times = [(k + 1) / number for k in range(number)]
        exact = [a_1 * DATA_STD**2 * time / variance_at(time) for time in times]
        errors.append(max(abs(float(adjoints[k]) - exact[k]) for k in range(number)))
    assert errors[1] < 0.6 * errors[0] and errors[1] < 0.01 * abs(a_1)


def test_the_control_of_the_minimum_is_the_velocity_of_the_tilted_data():
    """v* = v - eta a for the flow in t; here v falls in sigma, so v* = v + (sigma / (1 - sigma)) a."""
    m_tilted = DATA_MEAN + SCALE * SLOPE * DATA_STD**2
    for time in (0.2, 0.5, 0.9):
        sigma, x = 1 - time, 0.4

        def velocity(mean):
            x0 = mean + time * DATA_STD**2 / variance_at(time) * (x - time * mean)
            return (x - x0) / sigma

        adjoint = -SCALE * SLOPE * DATA_STD**2 * time / variance_at(time)
        assert velocity(DATA_MEAN) + sigma / time * adjoint == pytest.approx(velocity(m_tilted), abs=1e-12)


# --- a mixture: the fixed point without training ------------------------------------------------------------------------


WEIGHTS, CENTRES, WIDTH = torch.tensor([0.3, 0.7]).double(), torch.tensor([-1.0, 0.8]).double(), 0.35
TARGET, PRECISION = 0.3, 1.5  # r(x) = -(x - y)^2 / 2


def tilted_mixture():
    """The mixture times exp(-lambda (x - y)^2 / 2)."""
    variance = 1 / (1 / WIDTH**2 + PRECISION)
    centres = variance * (CENTRES / WIDTH**2 + PRECISION * TARGET)
    weights = WEIGHTS * (-0.5 * (CENTRES - TARGET).square() / (WIDTH**2 + 1 / PRECISION)).exp()
    return weights / weights.sum(), centres, variance**0.5


def mixture_velocity(mixture, sigma, x):
    weights, centres, width = mixture
    alpha, x = 1 - sigma, x[..., None]
    variance = alpha**2 * width**2 + sigma**2
    share = (weights.log() - 0.5 * (x - alpha * centres).square() / variance).softmax(-1)
    x0 = (share * (centres + alpha * width**2 / variance * (x - alpha * centres))).sum(-1)
    return (x[..., 0] - x0) / sigma


def fixed_point_residual(number, sign=1.0, ode_drift=False, samples=6000):
    """Relative L2 norm of E[u_k + s_k a_{k+1} | x_k] under the exact control, the mean fitted by a cubic."""
    sigmas = torch.linspace(1, 0, number + 1).tolist()
    base, optimal = (WEIGHTS, CENTRES, WIDTH), tilted_mixture()
    kernels = [KERNELS["memoryless"](sigmas[k], sigmas[k + 1], 1.0, sigmas[1]) for k in range(number)]
    generator = torch.Generator().manual_seed(0)

    def mean(mixture, k, x):
        return kernels[k].x_weight * x + kernels[k].v_weight * mixture_velocity(mixture, sigmas[k], x)

    def pulled(k, x):
        return x + (sigmas[k + 1] - sigmas[k]) * mixture_velocity(base, sigmas[k], x) if ode_drift else mean(base, k, x)

    states = [torch.randn(samples, 1, generator=generator, dtype=torch.float64)]
    for k in range(number):
        drawn = mean(optimal, k, states[-1])
        states.append(drawn + kernels[k].std * torch.randn(drawn.shape, generator=generator, dtype=torch.float64))
    adjoints = lean_adjoints(states, pulled, terminal_adjoint(-sign * (states[-1] - TARGET), PRECISION))
    error, size = 0.0, 0.0
    for k in range(number - 1):
        x, std = states[k], torch.tensor(kernels[k].std)
        u = control(mean(optimal, k, x), mean(base, k, x), std)
        features = torch.cat([x**p for p in range(4)], 1)
        fitted = features @ torch.linalg.lstsq(features, u + std * adjoints[k]).solution
        error, size = error + float(fitted.square().sum()), size + float(u.square().sum())
    return math.sqrt(error / size)


def test_the_exact_control_is_the_fixed_point():
    residuals = [fixed_point_residual(number) for number in (20, 40, 80, 160)]
    assert all(finer / coarser < 0.7 for coarser, finer in zip(residuals, residuals[1:])), residuals
    assert residuals[-1] < 0.15, residuals


@pytest.mark.parametrize("wrong, least", [({"sign": -1.0}, 1.5), ({"ode_drift": True}, 0.5)])
def test_a_wrong_adjoint_is_no_fixed_point(wrong, least):
    assert fixed_point_residual(80, **wrong) > least


# --- the loss and its parts --------------------------------------------------------------------------------------------


def test_loss_by_hand():
    mean, base = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    adjoint, std = torch.tensor([[1.0, -4.0], [2.0, 0.0]]), torch.full((1, 1), 0.5)
    # ((1 / .5 + .5)^2 + (1 / .5 - 2)^2, (.5 * 2)^2)
    assert adjoint_matching_loss(mean, base, std, adjoint).tolist() == [6.25, 1.0]
    assert adjoint_matching_loss(mean, base, std, adjoint, weight=3.0, per_dim=2).tolist() == [9.375, 1.5]
    found = matching_diagnostics(mean, base, std, adjoint, torch.tensor([True, False]))
    assert found == {"loss": 3.625, "uncontrolled": (0.25 + 4 + 1) / 2, "kl": 2.0, "masked": 0.5}
    total = summary([found, {**found, "masked": 0.0}], 1)
    assert total == {"residual": pytest.approx(3.625 / 2.625), "kl": 4.0, "masked": 0.25}
    with pytest.raises(ValueError, match="no control"):
        adjoint_matching_loss(mean, base, torch.zeros(1, 1), adjoint)


def test_targets_have_no_gradient():
    mean, base, adjoint = (torch.randn(2, 3, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(3))
    adjoint_matching_loss(mean, base, torch.ones(1, 1), adjoint).sum().backward()
    assert mean.grad.abs().min() > 0 and base.grad is None and adjoint.grad is None


def test_half_the_loss_without_a_reward_is_the_kl_of_the_paths():
    """Girsanov: the sum of |u|^2 / 2 along the chain's own paths is the mean log-ratio of the paths, and its closed form."""
    generator, number, chain = torch.Generator().manual_seed(0), 20_000, probed(flow(8))
    x, girsanov, log_ratio = torch.randn(number, 1, generator=generator, dtype=torch.float64), 0.0, 0.0
    for slope, offset, std in chain[:-1]:
        base, own = (GaussianTransition(slope * x + offset + shift, f64(std)) for shift in (0.0, 0.1 * (1 + x)))
        half = adjoint_matching_loss(own.mean, base.mean, base.std, torch.zeros_like(x)) / 2
        torch.testing.assert_close(half, own.kl(base), rtol=1e-12, atol=1e-12)
        x = own.sample(generator)
        girsanov, log_ratio = girsanov + half, log_ratio + own.log_prob(x) - base.log_prob(x)
    difference = log_ratio - girsanov
    assert girsanov.mean() > 0.1
    assert abs(difference.mean()) < 4 * difference.std() / number**0.5


def test_half_precision_neither_overflows_nor_leaves_the_adjoint():
    x, adjoint = torch.ones(2, 3), torch.tensor([[1e6, -2e6, 0.0], [0.0, 0.0, 0.0]])
    pulled = pulled_back(lambda x: 0.5 * x.half(), x, adjoint)
    assert pulled.dtype == torch.float32 and torch.equal(pulled, 0.5 * adjoint)


def test_outliers_are_left_out_whole():
    loss = torch.tensor([1.0, 3.0, 2.0], requires_grad=True)
    assert loss_threshold(1.6, 10.0, 40) == pytest.approx(4.0) and loss_threshold(None, 10.0, 40) is None
    assert within(loss, 2.0).tolist() == [True, False, True] and within(loss, None).all()


def test_matched_steps():
    steps = matched_steps(range(39), 10, 10, random.Random(0))
    assert steps[-10:] == list(range(29, 39)) and len(set(steps)) == 20 and steps == sorted(steps)
    assert steps[:10] != matched_steps(range(39), 10, 10, random.Random(1))[:10]
    assert matched_steps(range(9), 10, 10, random.Random(0)) == list(range(9))
    assert matched_steps([0, 1, 2], 0, 2, random.Random(0)) in ([0, 1], [0, 2], [1, 2])


def test_smoothing_cuts_the_longest_and_averages():
    gradients = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]], [[30.0, 40.0]]])
    torch.testing.assert_close(smoothed_gradient(gradients, 0.5), torch.tensor([[(1 + 1.2) / 3, (2 + 1.6) / 3]]))
    torch.testing.assert_close(smoothed_gradient(gradients, 1.0), gradients.mean(0))


def test_a_reward_gradient_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="NaN or infinite"):
        terminal_adjoint(torch.tensor([[1.0, float("inf")]]), 2.0)
    assert terminal_adjoint(torch.ones(1, 2).half(), 1e6).tolist() == [[-1e6, -1e6]]
