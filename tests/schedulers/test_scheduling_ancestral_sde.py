"""Ancestral samplers: the law of learned variances on Gaussian data, where the best one is known; gradients through both halves; continuous time."""

import math

import pytest
import torch
from diffusers import DDPMScheduler, DDPMWuerstchenScheduler, UnCLIPScheduler
from marginals import MEAN, VARIANCE, order, run_chain
from own_noise import IF, ROWS, begun
from schedules import randn
from torch.distributions import Normal, kl_divergence

from diffusers_align import sde_twin
from diffusers_align.schedulers import DDPMSDEScheduler, UnCLIPSDEScheduler, WuerstchenSDEScheduler


def posterior(x, alpha, sigma):
    """E[x_0 | x_t] and Var[x_0 | x_t] of data N(m, s^2)."""
    total = alpha**2 * VARIANCE + sigma**2
    return MEAN + alpha * VARIANCE / total * (x - alpha * MEAN), VARIANCE * sigma**2 / total


def learned(twin, k, x, best=True):
    """The exact noise, and the weight with which the variance is that of the exact reverse step (or the least)."""
    time = int(twin.timesteps[k])
    previous = int(twin.timesteps[k + 1]) if k + 1 < len(twin.timesteps) else -1
    alpha2, before = float(twin.alphas_cumprod[time]), float(twin.alphas_cumprod[previous]) if previous >= 0 else 1.0
    alpha, sigma = math.sqrt(alpha2), math.sqrt(1 - alpha2)
    clean, spread = posterior(x, alpha, sigma)
    beta = 1 - alpha2 / before
    least = max((1 - before) / (1 - alpha2) * beta, 1e-20)
    exact = least + (math.sqrt(before) * beta / (1 - alpha2)) ** 2 * spread
    weight = 2 * (math.log(exact) - math.log(least)) / (math.log(beta) - math.log(least)) - 1 if best else -1.0
    return torch.cat([(x - alpha * clean) / sigma, torch.full_like(x, weight)], 1)


def learned_chain(twin, best=True):
    alpha2 = float(twin.alphas_cumprod[twin.timesteps[0]])

    def affine(k):
        x = torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(2, 1)
        draw = twin._draw(learned(twin, k, x, best), k, x)
        base, moved = draw.mean.flatten().tolist()
        return moved - base, base, float(draw.std.flatten()[0])

    return run_chain(math.sqrt(alpha2) * MEAN, alpha2 * VARIANCE + 1 - alpha2, (affine(k) for k in range(twin.num_steps)))


LEARNED = {
    "ddpm": lambda: DDPMScheduler(variance_type="learned_range", clip_sample=False, beta_schedule="squaredcos_cap_v2"),
    "unclip": lambda: UnCLIPScheduler(variance_type="learned_range", clip_sample=False),
}


@pytest.mark.parametrize("steps", [3, 10, 40])
@pytest.mark.parametrize("kind", LEARNED)
def test_with_the_best_learned_variance_the_law_is_exact_at_any_number_of_steps(kind, steps):
    mean, variance, _ = learned_chain(begun(sde_twin(LEARNED[kind]()), steps))
    assert mean == pytest.approx(MEAN, abs=2e-3) and variance == pytest.approx(VARIANCE, abs=2e-3)
    assert learned_chain(begun(sde_twin(LEARNED[kind]()), steps), best=False)[1] < VARIANCE - 1e-2 * 10 / steps


@pytest.mark.parametrize("name", ["if", "ddpm learned", "unclip decoder"])
def test_a_learned_std_belongs_to_each_element_and_has_gradients_as_the_mean_has(name):
    row = ROWS[name]
    twin, state = row.pair()[1], randn(0)
    output = row.output(0, state).requires_grad_()
    kernel = twin.transition(output, twin.timesteps[2], state)
    assert kernel.std.shape == state.shape and len(kernel.std.unique()) > 10
    action = kernel.sample(torch.Generator().manual_seed(0)).detach()
    (grad,) = torch.autograd.grad(kernel.log_prob(action).sum(), output, retain_graph=True)
    (expected,) = torch.autograd.grad(Normal(kernel.mean, kernel.std).log_prob(action).sum(), output)
    torch.testing.assert_close(grad, expected)
    mean_half, std_half = grad.chunk(2, 1)
    assert bool(mean_half.any()) and bool(std_half.abs().min() > 0)


def test_kl_of_learned_variances_is_that_of_torch():
    row = ROWS["ddpm learned"]
    twin, state = row.pair()[1], randn(0)
    p, q = (twin.transition(row.output(k, state), twin.timesteps[0], state) for k in (0, 1))
    expected = kl_divergence(Normal(p.mean.double(), p.std.double()), Normal(q.mean.double(), q.std.double())).flatten(1).sum(1)
    torch.testing.assert_close(p.kl(q), expected, rtol=1e-5, atol=1e-3)


def test_thresholding_is_that_of_each_sample():
    """The clean sample is clipped at a quantile of its own values, and divided by it: as in the stock scheduler, for each sample by itself."""
    twin = begun(sde_twin(DDPMScheduler(**IF, variance_type="learned_range")), 4)
    state, output = 5 * randn(0), torch.cat([randn(1), randn(2)], 1)
    together = twin.transition(output, twin.timesteps[1], state)
    alone = twin.transition(output[1:], twin.timesteps[1], state[1:])
    assert torch.equal(together.mean[1:], alone.mean)
    clean = twin.clean_sample(output, twin.timesteps[1], state)
    assert float(clean.abs().max()) <= 1 and torch.equal(clean, twin._threshold_sample(clean_estimate(twin, output, state)))


def clean_estimate(twin, output, state):
    alpha = twin.alphas_cumprod[twin.timesteps[1]]
    return (state - (1 - alpha) ** 0.5 * output.chunk(2, 1)[0]) / alpha**0.5


@pytest.mark.parametrize("kind", LEARNED)
def test_an_output_without_the_learned_variance_is_refused(kind):
    twin = begun(sde_twin(LEARNED[kind]()), 4)
    with pytest.raises(ValueError, match="answers with twice the channels of the state, 8, got 4.*variance_type='fixed_small'"):
        twin.step(randn(0), twin.timesteps[0], randn(1))


def test_only_ddpm_with_a_learned_variance_keeps_its_own_step():
    assert type(sde_twin(DDPMScheduler(variance_type="learned"))) is DDPMSDEScheduler
    assert type(sde_twin(DDPMScheduler(variance_type="fixed_large"))).__name__ == "DDIMSDEScheduler"
    assert type(sde_twin(UnCLIPScheduler())) is UnCLIPSDEScheduler


def test_the_denoising_output_is_without_the_variance():
    row = ROWS["if"]
    twin, state = row.pair()[1], randn(0)
    assert torch.equal(twin.denoising_output(row.output(0, state), state), row.output(0, state)[:, :4])
    fixed = ROWS["unclip prior"].pair()[1]
    assert torch.equal(fixed.denoising_output(state, state), state)


def test_unclip_steps_along_its_schedule_only():
    twin = begun(sde_twin(UnCLIPScheduler()), 4)
    with pytest.raises(ValueError, match=f"ends at {int(twin.timesteps[1])}, the schedule's next timestep, got prev_timestep=5"):
        twin.step(randn(0), twin.timesteps[0], randn(1), prev_timestep=5)


# Continuous time


def wuerstchen_chain(steps):
    twin = begun(sde_twin(DDPMWuerstchenScheduler()), steps)
    level = lambda k: float(twin._alpha_cumprod(twin.timesteps[k].reshape(1), "cpu"))  # noqa: E731

    def affine(k):
        x = torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(2, 1)
        alpha, sigma = math.sqrt(level(k)), math.sqrt(1 - level(k))
        draw = twin._draw((x - alpha * posterior(x, alpha, sigma)[0]) / sigma, k, x)
        base, moved = draw.mean.flatten().tolist()
        return moved - base, base, float(draw.std.flatten()[0]) if twin._has_noise(k) else 0.0

    return run_chain(math.sqrt(level(0)) * MEAN, level(0) * VARIANCE + 1 - level(0), (affine(k) for k in range(steps)))


def test_wuerstchen_converges_to_the_datas_law_with_order_one():
    steps = (20, 40, 80, 160)
    chains = [wuerstchen_chain(k) for k in steps]
    errors = [c[1] - VARIANCE for c in chains]
    assert 0.7 < order(steps, errors) < 1.3 and abs(errors[-1]) < 0.015, errors
    assert max(abs(c[0] - MEAN) for c in chains) < 2e-3


@pytest.mark.parametrize("scaler", [0.5, 1.0, 2.0])
def test_wuerstchens_levels_are_those_of_its_noising(scaler):
    stock = DDPMWuerstchenScheduler(scaler=scaler)
    twin, times = sde_twin(stock), torch.tensor([0.1, 0.9])
    assert type(twin) is WuerstchenSDEScheduler
    expected = stock.add_noise(torch.zeros(2, 1, 1, 1), torch.ones(2, 1, 1, 1), times).flatten()
    torch.testing.assert_close(twin.noise_weight(times), expected)
