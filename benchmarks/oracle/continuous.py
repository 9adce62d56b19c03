"""What moves means, weighs particles or chooses candidates: methods of the chain before it is rounded to the grid, and of its draws."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffusers_align.algorithms.adjoint_matching import adjoint_matching_loss, lean_adjoints, terminal_adjoint
from diffusers_align.algorithms.guidance import Level, clean_change
from diffusers_align.algorithms.particle_steering import initial_weights, resample, reweight, twist
from diffusers_align.algorithms.svdd import choose
from diffusers_align.rl.chain import Mixture, ancestral_step, flow_levels, on_grid, soft_values
from diffusers_align.rl.episodes import draw

from .problem import Problem, problem, reward_of

Shift = Callable[[int, Tensor], Tensor]


def even_sigmas(steps: int) -> tuple[float, ...]:
    """From 1 to 0.06 in even steps: the last one stays wider than a cell of the grid."""
    return tuple(torch.linspace(1, 0.06, steps + 1, dtype=torch.float64).tolist())


def even(steps: int, points: int = 241) -> Problem:
    """The problem with so many ancestral steps."""
    return problem(points, even_sigmas(steps))


def interpolated(table: Tensor, grid: Tensor, x: Tensor) -> Tensor:
    """The values at x (...) of a function that is linear between its values (G,) on the grid."""
    position = ((x - grid[0]) / (grid[1] - grid[0])).clamp(0, len(grid) - 1 - 1e-9)
    left = position.detach().floor().long()
    return torch.lerp(table[left], table[left + 1], position - left)


def slope(table: Tensor, grid: Tensor, x: Tensor) -> Tensor:
    """Its derivative at x (...), itself made linear between central differences."""
    return interpolated(torch.gradient(table, spacing=(grid,))[0], grid, x)


def histogram(x: Tensor, grid: Tensor) -> Tensor:
    """The shares (G,) of samples x (N,) that are nearest to each point of the grid."""
    cells = torch.bucketize(x, (grid[1:] + grid[:-1]) / 2)
    return torch.bincount(cells, minlength=len(grid)).to(grid) / len(x)


# --- Adjoint Matching --------------------------------------------------------------------------------------------------


def adjoint_matching(steps: int, seed: int, *, updates: int = 150, batch: int = 1024, knots: int = 41) -> Tensor:
    """Samples (G,) of a mean that is learned as a table, an addition to the pretrained one that is linear between knots."""
    held, generator = even(steps), torch.Generator().manual_seed(seed)
    mixture, levels, stds = Mixture(), flow_levels(even_sigmas(steps)), held.chain.stds
    places = torch.linspace(-4, 4, knots, dtype=torch.float64)
    table = torch.zeros(steps, knots, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([table], lr=0.05)

    def base(k: int, x: Tensor) -> Tensor:
        return ancestral_step(mixture.clean(x, levels[k]), x, levels[k], levels[k + 1])[0]

    def walk(number: int) -> list[Tensor]:
        states = [torch.randn(number, 1, generator=generator, dtype=torch.float64)]
        for k in range(steps):
            mean = base(k, states[-1]) + interpolated(table[k].detach(), places, states[-1])
            states.append(mean + stds[k] * torch.randn(number, 1, generator=generator, dtype=torch.float64))
        return states

    for update in range(updates):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - update / updates)
        states = walk(batch)
        final = states[-1].requires_grad_()
        gradient = torch.autograd.grad(reward_of(final).sum(), final)[0]
        adjoints = lean_adjoints(states, base, terminal_adjoint(gradient, 1 / held.beta))
        losses = 0.0
        for k in range(steps):
            held_mean = base(k, states[k].detach())
            mean = held_mean + interpolated(table[k], places, states[k].detach())
            losses = losses + adjoint_matching_loss(mean, held_mean, stds[k], adjoints[k]).mean()
        optimizer.zero_grad()
        losses.backward()
        optimizer.step()
    return histogram(walk(2**19)[-1][:, 0], held.chain.grid)


# --- guidance by a value -----------------------------------------------------------------------------------------------


def guided(held: Problem, shift: Shift, mean_shift: Shift | None = None) -> Tensor:
    """Samples (G,) of the chain whose clean estimate (G,) moves by `shift` of the step and the states, and whose mean by `mean_shift`; exactly, no draws."""
    grid, levels = held.chain.grid, flow_levels(even_sigmas(held.chain.num_steps))
    state = held.chain.initial
    for k in range(held.chain.num_steps):
        mean, std = ancestral_step(held.chain.clean[k] + shift(k, grid), grid, levels[k], levels[k + 1])
        if mean_shift:
            mean = twist(mean, held.chain.stds[k], mean_shift(k, mean))
        state = state @ on_grid(mean, std, grid)
    return state


def nothing(k: int, x: Tensor) -> Tensor:
    """No shift."""
    return torch.zeros_like(x)


def value_guidance(steps: int) -> Tensor:
    r"""Guidance by the exact value: the score of the noise-aware $e^{V_k / \beta}$ enters the clean estimate, as a classifier's does. Of pure noise, which the
    chain forgets, the value is flat."""
    held = even(steps)
    grid, values = held.chain.grid, soft_values(held.chain, held.reward, held.beta)
    levels = [Level(*level) for level in flow_levels(even_sigmas(steps))]
    return guided(held, lambda k, x: clean_change(slope(values[k], grid, x) / held.beta, levels[k]) if k else nothing(k, x))


def plug_in_guidance(steps: int) -> Tensor:
    """The same with the reward of the clean estimate in the place of the value."""
    held = even(steps)
    grid, levels = held.chain.grid, [Level(*level) for level in flow_levels(even_sigmas(steps))]
    rewards = [reward_of(clean) for clean in held.chain.clean]
    return guided(held, lambda k, x: clean_change(slope(rewards[k], grid, x) / held.beta, levels[k]) if k else nothing(k, x))


def twisted(steps: int) -> Tensor:
    """The proposal of twisted particles with the exact value of the next state, without their weights."""
    held = even(steps)
    values = soft_values(held.chain, held.reward, held.beta)
    return guided(held, nothing, lambda k, mean: slope(values[k + 1], held.chain.grid, mean) / held.beta)


# --- particles and candidates ------------------------------------------------------------------------------------------


def steered(held: Problem, seed: int, *, groups: int = 512, particles: int = 256, potential: str = "difference") -> tuple[Tensor, Tensor]:
    """Samples (G,) by weighted particles, and the log-evidence of the groups (P,)."""
    chain, generator = held.chain, torch.Generator().manual_seed(seed)
    weights = initial_weights(groups, particles)
    states = draw(chain.initial.expand(groups * particles, -1), generator).reshape(groups, particles)
    for k in range(chain.num_steps):
        states = draw(chain.kernels[k][states.flatten()], generator).reshape(groups, particles)
        last = k + 1 == chain.num_steps
        rewards = reward_of(chain.clean[k + 1])[states]
        weights = reweight(weights, rewards, potential=potential, reward_scale=1 / held.beta, last=last)
        if not last:
            weights, index = resample(weights, torch.rand(groups, particles, generator=generator, dtype=torch.float64))
            states = states.gather(1, index)
    log_weight = weights.log_weight + weights.log_evidence[:, None]
    shares = torch.zeros_like(chain.grid).index_add(0, states.flatten(), log_weight.flatten().softmax(0))
    return shares, log_weight.logsumexp(1) - torch.tensor(float(particles)).log()


def candidates(held: Problem, seed: int, *, number: int, exact: bool, samples: int = 2**15) -> Tensor:
    """Samples (G,) of SVDD with so many candidates a step, chosen by the exact value, or by the reward of the clean estimate."""
    chain, generator = held.chain, torch.Generator().manual_seed(seed)
    values = soft_values(chain, held.reward, held.beta) if exact else reward_of(chain.clean)
    states = draw(chain.initial.expand(samples, -1), generator)
    for k in range(chain.num_steps):
        drawn = draw(chain.kernels[k][states].repeat_interleave(number, 0), generator).reshape(samples, number)
        chosen = choose(values[k + 1][drawn], torch.rand(samples, generator=generator, dtype=torch.float64), alpha=held.beta)
        states = drawn.gather(1, chosen[:, None])[:, 0]
    return torch.bincount(states, minlength=len(chain.grid)).to(chain.grid) / samples
