"""The best of n, its neighbours and its KL."""

import math

import pytest
import torch

from diffusers_align.algorithms.best_of_n import best, neighbour


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- SVDD, best-of-n ------------------------------------------------------------------------------------------------------


def test_the_best_is_the_first_largest_and_never_nan():
    rewards = torch.tensor([[1.0, 3.0, 3.0], [torch.nan, -5.0, torch.nan], [torch.nan] * 3])
    assert best(rewards).tolist() == [1, 1, 0]


def test_neighbours_keep_the_law_of_noise_and_have_the_cosine_asked_for():
    pivot, fresh = normal(200_000), normal(200_000, seed=1)
    near = neighbour(pivot, fresh, cosine=0.95)
    assert near.std().item() == pytest.approx(1, abs=0.01) and torch.cosine_similarity(near, pivot, dim=0).item() == pytest.approx(0.95, abs=0.005)
    assert torch.equal(neighbour(pivot, fresh, cosine=1.0), pivot) and torch.equal(neighbour(pivot, fresh, cosine=0.0), fresh)
    with pytest.raises(ValueError, match="cosine"):
        neighbour(pivot, fresh, cosine=1.5)


def test_the_kl_of_best_of_n_is_its_closed_form():
    # For a continuous reward the density of the best, relative to one draw, is N u^(N - 1) at the reward's quantile u.
    u = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    for number in (1, 2, 8):
        ratio = number * u ** (number - 1)
        assert float((ratio * ratio.log()).mean()) == pytest.approx(math.log(number) - (number - 1) / number, abs=1e-5)
