"""Slow or special ways to values that the package finds otherwise: what its functions are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffusers_align.rl.trust_region import Sweep, flat_gradient


def euler_step(velocity: Callable[[Tensor, float], Tensor], sigmas: Sequence[float]) -> Callable[[int, Tensor], Tensor]:
    """step(k, x) = x + (sigma_{k+1} - sigma_k) velocity(x, sigma_k)."""
    return lambda k, x: x + (sigmas[k + 1] - sigmas[k]) * velocity(x, sigmas[k])


@torch.no_grad()
def states_forwards(step: Callable[[int, Tensor], Tensor], x: Tensor, num_steps: int) -> list[Tensor]:
    """The num_steps + 1 states of the chain that starts at `x` (B, *D)."""
    states = [x]
    for k in range(num_steps):
        states.append(step(k, states[-1]))
    return states


@torch.no_grad()
def states_backwards(velocity: Callable[[Tensor, float], Tensor], x: Tensor, sigmas: Sequence[float]) -> list[Tensor]:
    """The states of an Euler chain that ends at `x` (B, *D), found by integrating from there to the noise: off by O(step)."""
    states = [x]
    for k in reversed(range(len(sigmas) - 1)):
        states.append(states[-1] - (sigmas[k + 1] - sigmas[k]) * velocity(states[-1], sigmas[k + 1]))
    return states[::-1]


def linear_path(state_weights: list[float], output_weights: list[float]) -> list[float]:
    r"""The weight of each step's output in the final state, $B_k \prod_{j>k} A_j$, from the solver's $A_k$ and $B_k$."""
    weights, product = [], 1.0
    for a, b in zip(reversed(state_weights), reversed(output_weights)):
        weights.append(b * product)
        product *= a
    return weights[::-1]


def exact_fisher_product(sweep: Sweep, parameters: Sequence[Tensor], vector: Tensor) -> Tensor:
    """F v (P,) of all steps of `sweep`, summed: the Hessian of their Gaussian KL, by differentiating twice.

    Raises:
        RuntimeError: from torch, where a kernel has no second derivative, such as fused attention.
    """
    total = torch.zeros_like(vector)

    def on_step(mean: Tensor, std: Tensor) -> None:
        kl = ((mean - mean.detach()) / std).square().sum() / 2
        slope = flat_gradient(kl, parameters, create_graph=True)
        total.add_(flat_gradient(slope.dot(vector), parameters))

    with torch.enable_grad():
        sweep(on_step)
    return total
