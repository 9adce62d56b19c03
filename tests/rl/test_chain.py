"""A denoising chain on a grid: its kernels are the schedulers', and its optimum is the closed form's."""

import math

import pytest
import torch
from diffusers import DDIMScheduler
from mutants import assert_mutants_fail

from diffusers_align import sde_twin
from diffusers_align.rl.chain import (
    Mixture,
    aligned,
    ancestral_step,
    as_mdp,
    discretised_chain,
    flow_levels,
    flow_sde_step,
    marginals,
    on_grid,
    path_divergence,
    soft_values,
    tilted,
    total_variation,
)
from diffusers_align.rl.mdp import action_values, divergence, expectation_v, soft_value_iteration
from diffusers_align.schedulers import kernels

BETA = 0.5
SIGMAS = [1.0, 0.7, 0.4, 0.15]
MIXTURE, GAUSSIAN = Mixture(), Mixture((1.0,), (0.7,), (0.6,))
X = torch.linspace(-2, 2, 9, dtype=torch.float64)


def grid(points: int, width: float = 4.0) -> torch.Tensor:
    return torch.linspace(-width, width, points, dtype=torch.float64)


def close(found, expected, atol=1e-10):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=atol)


# the mixture and the kernels


def test_the_score_is_the_densitys_slope_and_the_clean_estimate_is_tweedies():
    for level in ((0.3, 0.7), (0.8, 0.6)):
        x = X.clone().requires_grad_()
        (slope,) = torch.autograd.grad(MIXTURE.log_density(x, level).sum(), x)
        close(MIXTURE.score(X, level), slope)
        close(MIXTURE.clean(X, level), (X + level[1] ** 2 * slope) / level[0])
    mass = MIXTURE.log_density(grid(4001, 8.0), (0.8, 0.6)).exp().sum() * 16 / 4000
    assert mass.item() == pytest.approx(1)
    # Of a Gaussian by hand: what pure noise says is the mean of the data.
    close(GAUSSIAN.clean(X, (0.0, 1.0)), torch.full_like(X, 0.7))
    close(GAUSSIAN.clean(X, (0.5, 0.5)), 0.7 + 0.5 * 0.36 * (X - 0.35) / (0.25 * 0.36 + 0.25))


@pytest.mark.parametrize("sigma, sigma_next", [(1.0, 0.7), (0.7, 0.4), (0.4, 0.0)])
def test_flow_kernels_are_the_schedulers(sigma, sigma_next):
    level, level_next = flow_levels([sigma, sigma_next])
    clean = MIXTURE.clean(X, level)
    velocity = (X - clean) / sigma
    for kernel, found in (
        (kernels.memoryless(sigma, sigma_next, 0.0, 0.7), ancestral_step(clean, X, level, level_next)),
        (kernels.flow_grpo(sigma, sigma_next, 0.6, 0.7), flow_sde_step(clean, X, level, level_next, 0.6, 0.7)),
    ):
        close(found[0], kernel.x_weight * X + kernel.v_weight * velocity, 1e-7)
        assert found[1] == pytest.approx(kernel.std, abs=1e-7)


def test_the_diffusion_kernel_is_the_schedulers():
    scheduler = sde_twin(DDIMScheduler(num_train_timesteps=1000, clip_sample=False), eta=1.0)
    scheduler.set_timesteps(10)
    alpha_bar = scheduler.alphas_cumprod.double()
    at, after = scheduler.timesteps[4], scheduler.timesteps[5]
    level, level_next = ((alpha_bar[t].sqrt().item(), (1 - alpha_bar[t]).sqrt().item()) for t in (at, after))
    clean = MIXTURE.clean(X, level)
    noise = (X - level[0] * clean) / level[1]
    expected = scheduler.transition(noise[:, None].float(), at, X[:, None].float())
    mean, std = ancestral_step(clean, X, level, level_next)
    close(mean, expected.mean[:, 0].double(), 1e-5)
    assert std == pytest.approx(expected.std.flatten()[0].item(), abs=1e-5)


def test_rounding_to_the_grid():
    places = grid(9)
    row = on_grid(torch.tensor(0.3, dtype=torch.float64), 0.5, places)

    def below(x):
        return 0.5 * (1 + math.erf((x - 0.3) / 0.5 / math.sqrt(2)))

    close(row, [below(-3.5), *(below(m + 0.5) - below(m - 0.5) for m in range(-3, 4)), 1 - below(3.5)])
    assert on_grid(torch.tensor([0.3, -9.0]), 0.0, places.float()).argmax(1).tolist() == [4, 0], "a step without noise goes to the nearest point"


# the optimum


def chain_of(sampler="ddpm", points=61, mixture=MIXTURE, sigmas=SIGMAS):
    return discretised_chain(mixture, grid(points), flow_levels(sigmas), sampler=sampler)


@pytest.mark.parametrize("sampler", ["ddpm", "flow_sde"])
def test_the_aligned_chain_samples_the_tilt_exactly(sampler):
    chain = chain_of(sampler)
    reward = torch.sin(2 * chain.grid) - 0.2 * chain.grid.square()
    reference = marginals(chain.initial, chain.kernels)
    close(reference.sum(1), torch.ones(4))
    target = tilted(reference[-1], reward, BETA)
    close(target, reference[-1] * (reward / BETA).exp() / (reference[-1] * (reward / BETA).exp()).sum())

    def check(f):
        initial, policy = f(chain, reward, BETA)
        close(marginals(initial, policy)[-1], target)
        # The value is what it earns, less what it pays, of the first noise, too.
        paid = path_divergence(initial, policy, chain.kernels) + divergence(initial, chain.initial)
        earned = target @ reward - BETA * paid
        assert earned.item() == pytest.approx(BETA * (reference[-1] * (reward / BETA).exp()).sum().log().item())

    forgetting = {} if sampler == "ddpm" else {"chain.initial if fixed_noise": "chain.initial if True", "values[0], chain": "0 * values[0], chain"}
    assert_mutants_fail(check, aligned, {"values[1:]": "values[:-1]"} | forgetting)
    values = soft_values(chain, reward, BETA)
    by_hand = BETA * (chain.kernels[-1] @ (reward / BETA).exp()).log()
    assert_mutants_fail(
        lambda f: close(f(chain, reward, BETA)[-2:], torch.stack([by_hand, reward])),
        soft_values,
        {"reversed(chain": "(chain", "kernel, beta": "kernel, 2 * beta"},
    )
    for k in range(3):
        close(values[k], BETA * (chain.kernels[k] @ (values[k + 1] / BETA).exp()).log())


def test_a_first_noise_that_stays_reaches_the_tilt_of_a_memoryless_chain_alone():
    found = {}
    for sampler in ("ddpm", "flow_sde"):
        chain = chain_of(sampler)
        reward = -(chain.grid - 0.4).square()
        target = tilted(marginals(chain.initial, chain.kernels)[-1], reward, BETA)
        found[sampler] = total_variation(marginals(*aligned(chain, reward, BETA, fixed_noise=True))[-1], target).item()
    assert found["ddpm"] < 1e-12 and 0.005 < found["flow_sde"] < 0.1


def test_a_diffusion_schedule_remembers_its_first_noise_a_little():
    """Stable Diffusion's table leaves a signal at its last timestep: the optimum with the first noise as it is is near p*, and is not p*."""
    alpha_bar = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
    at = [999, 799, 599, 399, 199, 19]
    chain = discretised_chain(MIXTURE, grid(61), [(alpha_bar[t].sqrt().item(), (1 - alpha_bar[t]).sqrt().item()) for t in at])
    reward = -(chain.grid - 0.4).square()
    target = tilted(marginals(chain.initial, chain.kernels)[-1], reward, BETA)
    assert total_variation(marginals(*aligned(chain, reward, BETA))[-1], target) < 1e-12
    assert 1e-5 < total_variation(marginals(*aligned(chain, reward, BETA, fixed_noise=True))[-1], target) < 0.01


def test_no_policy_does_better():
    chain, generator = chain_of(points=31), torch.Generator().manual_seed(0)
    reward = -(chain.grid - 0.4).square()
    best = chain.initial @ soft_values(chain, reward, BETA)[0]
    policy = aligned(chain, reward, BETA, fixed_noise=True)[1]

    def objective(policy):
        return marginals(chain.initial, policy)[-1] @ reward - BETA * path_divergence(chain.initial, policy, chain.kernels)

    close(objective(policy), best)
    for size in (0.01, 0.1, 1.0):
        noise = size * torch.randn(policy.shape, generator=generator, dtype=torch.float64)
        assert objective((policy.clamp(min=1e-300).log() + noise).softmax(-1)) < best


def test_the_table_has_the_same_optimum_and_the_same_samples():
    chain = chain_of(points=15)
    reward = -(chain.grid - 0.4).square()
    mdp, policy = as_mdp(chain, reward)
    assert mdp.reward.shape == (3 * 15 + 2, 15) and mdp.discount == 1
    values, found = soft_value_iteration(mdp, policy, beta=BETA)
    first, table = aligned(chain, reward, BETA)
    close(found[0], first)
    close(found[1:-1].reshape(3, 15, 15), table)
    close(values[1:-1].reshape(3, 15), soft_values(chain, reward, BETA)[:-1])
    close(action_values(mdp, values)[1:16], soft_values(chain, reward, BETA)[1].expand(15, 15))  # Q_k(x, x') = V_{k+1}(x')
    hard = torch.zeros(47, dtype=torch.float64)
    for _ in range(5):
        hard = expectation_v(mdp, policy, hard)
    assert hard[0].item() == pytest.approx((marginals(chain.initial, chain.kernels)[-1] @ reward).item())


def gaussian_chain(sampler: str) -> tuple[float, float]:
    """Mean and variance of the samples of the continuous chain of Gaussian data, whose kernels are affine."""
    mean, variance, levels = 0.0, 1.0, flow_levels(SIGMAS)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for level, after in zip(levels, levels[1:]):
        clean = GAUSSIAN.clean(ends, level)
        means, std = ancestral_step(clean, ends, level, after) if sampler == "ddpm" else flow_sde_step(clean, ends, level, after, 0.7, SIGMAS[1])
        offset, slope = means[0].item(), (means[1] - means[0]).item()
        mean, variance = offset + slope * mean, slope**2 * variance + std**2
    return mean, variance


REWARDS = {
    # r, and what N(m, v) tilted by e^{r / beta} is
    "linear": (lambda x: 0.6 * x, lambda m, v: (m + 0.6 * v / BETA, v)),
    "square": (lambda x: -(x - 0.2).square(), lambda m, v: ((m / v + 0.4 / BETA) / (1 / v + 2 / BETA), 1 / (1 / v + 2 / BETA))),
}


@pytest.mark.parametrize("sampler", ["ddpm", "flow_sde"])
@pytest.mark.parametrize("name", REWARDS)
def test_the_soft_optimum_of_gaussian_data_is_the_closed_form_to_the_second_order_of_the_grid(name, sampler):
    reward, tilt = REWARDS[name]
    mean, variance = tilt(*gaussian_chain(sampler))
    errors, widths = [], (81, 161, 321)
    for points in widths:
        chain = discretised_chain(GAUSSIAN, grid(points), flow_levels(SIGMAS), sampler=sampler)
        found = marginals(*aligned(chain, reward(chain.grid), BETA))[-1]
        errors.append(total_variation(found, on_grid(torch.tensor(mean, dtype=torch.float64), variance**0.5, chain.grid)).item())
        value = BETA * (soft_values(chain, reward(chain.grid), BETA)[0] / BETA + chain.initial.log()).logsumexp(0).item()
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert all(1.8 < order < 2.2 for order in orders) and errors[-1] < 1e-3
    if name == "linear":  # beta log E e^{r / beta}
        m, v = gaussian_chain(sampler)
        assert value == pytest.approx(0.6 * m + 0.36 * v / (2 * BETA), abs=1e-3)


def test_refusals():
    with pytest.raises(ValueError, match='"ddpm" or "flow_sde", got'):
        chain_of("cps")
    with pytest.raises(ValueError, match="flow_levels"):
        discretised_chain(MIXTURE, grid(9), [(0.6, 0.8), (1.0, 0.0)], sampler="flow_sde")
