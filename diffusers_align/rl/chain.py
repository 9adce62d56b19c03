r"""A denoising chain that is small enough to be known exactly: one dimension, a mixture of Gaussians for data, states on a grid.

The score of a mixture is known, so is the kernel of each sampler's step, $\mathcal N(\mu_k(x), s_k^2)$. Rounding the next state to a grid of width h makes
the chain a finite Markov decision process: a state is (k, x), an action is the next x, and the policy of the pretrained model is its own kernel. Moments
change by O(h^2). The draw of the first noise is an action too.

$$ V_K(x) = r(x), \qquad Q_k(x, x') = V_{k+1}(x'), \qquad V_k(x) = \beta \log \sum_{x'} p_k(x' \mid x)\, e^{V_{k+1}(x') / \beta}, \qquad
\pi^*_k(x' \mid x) = p_k(x' \mid x)\, e^{(V_{k+1}(x') - V_k(x)) / \beta} $$

Under $\pi^*$ the samples follow $p^*(x) \propto p_{ref}(x)\, e^{r(x) / \beta}$, exactly. A method that leaves the first noise as it is reaches it where
the chain is memoryless (the last state is independent of the first: ancestral steps from pure noise); elsewhere its optimum is that of `aligned` with
`fixed_noise`, which is another one (https://arxiv.org/abs/2409.08861, section 4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .mdp import FiniteMDP, soft_maximum, soft_policy

Level = tuple[float, float]


@dataclass(frozen=True)
class Mixture:
    """A mixture of M Gaussians in one dimension, as data.

    Attributes:
        weights, means, stds: of the components, M numbers each.
    """

    weights: tuple[float, ...] = (0.6, 0.4)
    means: tuple[float, ...] = (-1.0, 1.2)
    stds: tuple[float, ...] = (0.4, 0.3)

    def parts(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor, Tensor]:
        """Of x = alpha x0 + sigma noise (...): log of weight times density, mean and variance of each component's x, (..., M)."""
        alpha, sigma = level
        weight, mean, std = (torch.tensor(values, dtype=x.dtype, device=x.device) for values in (self.weights, self.means, self.stds))
        variance = (alpha * std).square() + sigma**2
        deviation = x[..., None] - alpha * mean
        log_density = weight.log() - 0.5 * (deviation.square() / variance + variance.log() + math.log(2 * math.pi))
        return log_density, deviation, variance

    def log_density(self, x: Tensor, level: Level = (1.0, 0.0)) -> Tensor:
        """log p of x = alpha x0 + sigma noise, (...)."""
        return self.parts(x, level)[0].logsumexp(-1)

    def score(self, x: Tensor, level: Level) -> Tensor:
        """d log p / dx, (...)."""
        log_density, deviation, variance = self.parts(x, level)
        return -(log_density.softmax(-1) * deviation / variance).sum(-1)

    def clean(self, x: Tensor, level: Level) -> Tensor:
        r"""$\hat x_0 = \mathbb E[x_0 \mid x]$, (...): what a perfect denoiser predicts, by Tweedie's formula where alpha > 0."""
        log_density, deviation, variance = self.parts(x, level)
        mean, std = (torch.tensor(values, dtype=x.dtype, device=x.device) for values in (self.means, self.stds))
        return (log_density.softmax(-1) * (mean + level[0] * std.square() * deviation / variance)).sum(-1)


# --- the kernels of the samplers ---------------------------------------------------------------------------------------


def ancestral_step(clean: Tensor, x: Tensor, level: Level, level_next: Level) -> tuple[Tensor, float]:
    r"""DDPM's step (https://arxiv.org/abs/2006.11239, eq. 7), DDIM's with eta = 1, for flow levels the memoryless kernel: mean (...) and std of
    $q(x' \mid x, \hat x_0)$ at the clean estimate (...), $\alpha' \hat x_0 + \sqrt{\sigma'^2 - s^2}\,\hat\epsilon$ with
    $s^2 = \frac{\sigma'^2}{\sigma^2}\big(\sigma^2 - \frac{\alpha^2}{\alpha'^2}\sigma'^2\big)$."""
    (alpha, sigma), (alpha_next, sigma_next) = level, level_next
    variance = (sigma_next / sigma) ** 2 * (sigma**2 - (alpha / alpha_next * sigma_next) ** 2)
    noise = (x - alpha * clean) / sigma
    return alpha_next * clean + math.sqrt(max(0.0, sigma_next**2 - variance)) * noise, math.sqrt(variance)


def flow_sde_step(clean: Tensor, x: Tensor, level: Level, level_next: Level, noise_level: float, second_sigma: float) -> tuple[Tensor, float]:
    r"""Flow-GRPO's step (https://arxiv.org/abs/2505.05470, eq. 9): Euler-Maruyama with $g = a \sqrt{\sigma / (1 - \sigma)}$, mean (...) and std. At sigma = 1
    `second_sigma`, the schedule's, stands in the denominator."""
    sigma, sigma_next = level[1], level_next[1]
    g = noise_level * math.sqrt(sigma / (1 - min(sigma, second_sigma if sigma > 0.999 else sigma)))
    velocity = (x - clean) / sigma
    drift = velocity + g**2 / (2 * sigma) * (x + (1 - sigma) * velocity)
    return x + drift * (sigma_next - sigma), g * math.sqrt(sigma - sigma_next)


def flow_levels(sigmas: Sequence[float]) -> list[Level]:
    """(alpha, sigma) = (1 - sigma, sigma)."""
    return [(1 - sigma, sigma) for sigma in sigmas]


# --- the chain ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DiscretisedChain:
    """A denoising chain on a grid.

    Attributes:
        grid: (G,), evenly spaced.
        initial: (G,), the distribution of the first noise.
        kernels: (K, G, G), p_k(x' | x), the pretrained model's policy.
        stds: (K,), s_k.
        clean: (K + 1, G), the predicted clean sample; of the last states they themselves.
    """

    grid: Tensor
    initial: Tensor
    kernels: Tensor
    stds: Tensor
    clean: Tensor

    @property
    def num_steps(self) -> int:
        return len(self.kernels)


def on_grid(mean: Tensor, std: float, grid: Tensor) -> Tensor:
    """The distribution (..., G) of a draw from N(mean, std^2) that is rounded to the nearest point of an even grid; beyond its ends, to these."""
    borders = (grid[1:] + grid[:-1]) / 2
    below = torch.special.ndtr((borders - mean[..., None]) / max(std, 1e-12))
    edges = torch.zeros_like(below[..., :1])
    return torch.cat([below, edges + 1], -1) - torch.cat([edges, below], -1)


def discretised_chain(mixture: Mixture, grid: Tensor, levels: Sequence[Level], *, sampler: str = "ddpm", noise_level: float = 0.7) -> DiscretisedChain:
    """The chain of a sampler with the exact score of `mixture`.

    Args:
        grid: (G,), evenly spaced, in float64; several points within each step's std, and as wide as the noise.
        levels: K + 1 pairs (alpha, sigma), from noise to data. For flow matching `flow_levels(sigmas)`; for diffusion the roots of alpha-bar and what it
            lacks to 1.
        sampler: `ddpm` (`ancestral_step`) or `flow_sde` (`flow_sde_step`, which needs flow levels).
        noise_level: a, of `flow_sde`.

    Raises:
        ValueError: an unknown sampler; `flow_sde` with other levels.
    """
    if sampler not in ("ddpm", "flow_sde"):
        raise ValueError(f'A sampler is "ddpm" or "flow_sde", got {sampler!r}.')
    if sampler == "flow_sde" and any(abs(alpha + sigma - 1) > 1e-9 for alpha, sigma in levels):
        raise ValueError("flow_sde needs levels with alpha = 1 - sigma: flow_levels(sigmas).")
    clean = [mixture.clean(grid, level) for level in levels[:-1]]
    if sampler == "ddpm":
        steps = [ancestral_step(x0, grid, a, b) for x0, a, b in zip(clean, levels, levels[1:])]
    else:
        steps = [flow_sde_step(x0, grid, a, b, noise_level, levels[1][1]) for x0, a, b in zip(clean, levels, levels[1:])]
    return DiscretisedChain(
        grid=grid,
        initial=on_grid(torch.zeros_like(grid[0]), 1.0, grid),  # as pipelines draw it, whatever signal the first level has
        kernels=torch.stack([on_grid(mean, std, grid) for mean, std in steps]),
        stds=torch.tensor([std for _, std in steps], dtype=grid.dtype, device=grid.device),
        clean=torch.stack([*clean, grid]),
    )


def marginals(initial: Tensor, policy: Tensor) -> Tensor:
    """The distribution of each state, (K + 1, G), of a policy (K, G, G) and a first noise (G,); the last is that of the samples."""
    states = [initial]
    for kernel in policy:
        states.append(states[-1] @ kernel)
    return torch.stack(states)


# --- what is optimal ---------------------------------------------------------------------------------------------------


def soft_values(chain: DiscretisedChain, reward: Tensor, beta: float) -> Tensor:
    """V_k(x), (K + 1, G), for the reward (G,) of the samples, by one backward sweep. Q_k(x, x') is V_{k+1}(x')."""
    values = [reward]
    for kernel in reversed(chain.kernels.unbind()):
        values.append(soft_maximum(values[-1].expand_as(kernel), kernel, beta))
    return torch.stack(values[::-1])


def aligned(chain: DiscretisedChain, reward: Tensor, beta: float, *, fixed_noise: bool = False) -> tuple[Tensor, Tensor]:
    r"""The first noise (G,) and the policy (K, G, G) that maximise $\mathbb E[r] - \beta\,\mathrm{KL}$ over paths.

    Args:
        fixed_noise: the first noise stays N(0, 1), as in training; then the samples follow p* only if the chain is memoryless.
    """
    values = soft_values(chain, reward, beta)
    policy = torch.stack([soft_policy(later.expand_as(kernel), kernel, beta) for kernel, later in zip(chain.kernels, values[1:])])
    return chain.initial if fixed_noise else soft_policy(values[0], chain.initial, beta), policy


def tilted(reference: Tensor, reward: Tensor, beta: float) -> Tensor:
    r"""$p^*(x) \propto p_{ref}(x)\, e^{r(x) / \beta}$, (G,)."""
    return soft_policy(reward, reference, beta)


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """Half the sum of absolute differences, over the last dimension: from 0 to 1."""
    return (p - q).abs().sum(-1) / 2


def path_divergence(initial: Tensor, policy: Tensor, reference: Tensor) -> Tensor:
    r"""$\sum_k \mathbb E_\pi\, \mathrm{KL}(\pi_k \| p_k)$, a scalar in nats: what a policy (K, G, G) from the same first noise (G,) is charged for."""
    log_ratio = (torch.special.xlogy(policy, policy) - torch.special.xlogy(policy, reference)).sum(-1)
    return (marginals(initial, policy)[:-1] * log_ratio).sum()


def as_mdp(chain: DiscretisedChain, reward: Tensor) -> tuple[FiniteMDP, Tensor]:
    """The chain as a table, and its own policy there, (S, A) with S = K G + 2 and A = G.

    State 0 is before the first noise, which is the first action; state 1 + k G + i is grid point i before step k; the last one is the end. The reward (G,)
    of the sample comes with the last action. Memory goes by S^2 A: for grids of some thirty points.
    """
    steps, points = chain.num_steps, len(chain.grid)
    states = steps * points + 2
    transition = torch.zeros(states, points, states).to(chain.grid)
    pays, policy = torch.zeros(states, points).to(chain.grid), torch.zeros(states, points).to(chain.grid)
    here = torch.arange(points)
    transition[0, here, 1 + here] = 1
    transition[-1, :, -1] = 1
    policy[0], policy[1:-1], policy[-1] = chain.initial, chain.kernels.reshape(-1, points), 1 / points
    for k in range(steps):
        rows = 1 + k * points + here
        if k + 1 < steps:
            transition[rows[:, None], here, 1 + (k + 1) * points + here] = 1
        else:
            transition[rows, :, -1], pays[rows] = 1, reward
    return FiniteMDP(transition, pays), policy
