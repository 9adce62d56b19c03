"""The chain, the reward and the tables that stand for a model: what every row of the oracle's table shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from diffusers_align.rl.chain import DiscretisedChain, Mixture, aligned, discretised_chain, flow_levels, marginals, path_divergence, soft_values, tilted
from diffusers_align.rl.episodes import draw

BETA = 0.5
SIGMAS = (1.0, 0.75, 0.5, 0.25, 0.06)


@dataclass(frozen=True)
class Problem:
    """A chain with a reward (G,) of its samples, and the temperature beta."""

    chain: DiscretisedChain
    reward: Tensor
    beta: float = BETA

    @cached_property
    def reference(self) -> Tensor:
        """p_ref, (G,): the samples of the pretrained model."""
        return marginals(self.chain.initial, self.chain.kernels)[-1]

    @cached_property
    def target(self) -> Tensor:
        """p*, (G,)."""
        return tilted(self.reference, self.reward, self.beta)

    @cached_property
    def best(self) -> Tensor:
        """The policy (K, G, G) that samples p*, from the first noise as it is."""
        return aligned(self.chain, self.reward, self.beta, fixed_noise=True)[1]

    @cached_property
    def value(self) -> Tensor:
        """The most that E[r] - beta KL can be, a scalar."""
        return self.chain.initial @ soft_values(self.chain, self.reward, self.beta)[0]

    def samples_of(self, policy: Tensor) -> Tensor:
        """(G,)"""
        return marginals(self.chain.initial, policy)[-1]

    def objective(self, policy: Tensor) -> Tensor:
        """E[r] - beta KL over paths, a scalar."""
        return self.samples_of(policy) @ self.reward - self.beta * path_divergence(self.chain.initial, policy, self.chain.kernels)

    def bound(self, policy: Tensor) -> float:
        r"""What the objective says of the distance to p*: its shortfall is $\beta\,\mathrm{KL}(\pi \| \pi^*)$ over paths, so by Pinsker's inequality the
        samples' total variation to p* is at most $\sqrt{(J^* - J) / 2\beta}$."""
        return float(((self.value - self.objective(policy)).clamp(min=0) / (2 * self.beta)).sqrt())


def reward_of(x: Tensor) -> Tensor:
    """-(x - 0.4)^2: best between the two modes, where the pretrained model is seldom."""
    return -(x - 0.4).square()


def problem(points: int = 31, sigmas: tuple[float, ...] = SIGMAS, sampler: str = "ddpm") -> Problem:
    """The mixture's chain on [-4, 4]. Each action has a little probability everywhere, so that every logarithm is finite."""
    grid = torch.linspace(-4, 4, points, dtype=torch.float64)
    chain = discretised_chain(Mixture(), grid, flow_levels(sigmas), sampler=sampler)
    floor = 1e-9
    kernels = (chain.kernels + floor) / (1 + floor * points)
    return Problem(replace(chain, kernels=kernels), reward_of(grid))


# --- a table as a model ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Paths:
    """N trajectories of a table: states (N, K + 1) as indices of the grid, and their log-probabilities (N, K) when they were drawn."""

    states: Tensor
    log_prob: Tensor

    @property
    def final(self) -> Tensor:
        return self.states[:, -1]


def roll_out(chain: DiscretisedChain, policy: Tensor, number: int, generator: torch.Generator) -> Paths:
    """Draw paths of a policy (K, G, G)."""
    states = [draw(chain.initial.expand(number, -1), generator)]
    for kernel in policy:
        states.append(draw(kernel[states[-1]], generator))
    found = torch.stack(states, 1)
    return Paths(found, log_probs(policy.log(), found))


def log_probs(log_policy: Tensor, states: Tensor) -> Tensor:
    """Of the steps of paths (N, K + 1) under a table (K, G, G) of logarithms, (N, K)."""
    return log_policy[torch.arange(len(log_policy)), states[:, :-1], states[:, 1:]]


def learn(
    problem: Problem, loss: Callable[[Tensor, torch.Generator], Tensor], seed: int, *, updates: int, learning_rate: float = 0.1, averaged: float = 0.5
) -> Tensor:
    """The policy (K, G, G) that Adam finds from the pretrained one, with a step that falls to 0.

    Args:
        loss: of the table of log-probabilities (K, G, G), with its graph, and a generator: a number, anew at each update.
        averaged: the last share of the updates whose tables are averaged: what is left of the batches' noise shrinks.
    """
    logits = problem.chain.kernels.log().clone().requires_grad_()
    generator, optimizer = torch.Generator().manual_seed(seed), torch.optim.Adam([logits], lr=learning_rate, betas=(0.9, 0.99))
    total, count = torch.zeros_like(logits), 0
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - update / updates)
        optimizer.zero_grad()
        loss(logits.log_softmax(-1), generator).backward()
        optimizer.step()
        if update >= (1 - averaged) * updates:
            total, count = total + logits.detach(), count + 1
    return (total / count).softmax(-1)
