"""A policy that moved a little from the one that sampled."""

import torch

from diffusers_align import GaussianTransition

SHAPE, D = (6, 3, 2, 2), 12


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step(std: float = 0.4, shift: float = 0.03, rows: int = 6, std_rows: int = 1):
    """A policy that moved a little from the one that sampled: (transition, old transition, actions)."""
    spread = torch.linspace(std, 1.5 * std, std_rows, dtype=torch.float64).reshape(-1, 1, 1, 1)
    old = GaussianTransition(randn(rows, 3, 2, 2), spread)
    new = GaussianTransition((old.mean + shift * randn(rows, 3, 2, 2, seed=1)).requires_grad_(), spread)
    return new, old, old.mean + spread * randn(rows, 3, 2, 2, seed=2)


def gradient(loss, mean):
    return torch.autograd.grad(loss.sum(), mean)[0]
