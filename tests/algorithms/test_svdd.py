"""SVDD's choice among candidates."""

import pytest
import torch

from diffusers_align.algorithms.svdd import choose


def uniforms(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- SVDD, best-of-n ------------------------------------------------------------------------------------------------------


def test_svdd_is_greedy_at_alpha_zero_uniform_at_infinity_and_a_softmax_between():
    values = torch.tensor([[0.1, 0.7, torch.nan, 0.2]])
    draws = uniforms(40_000)
    many = values.expand(40_000, -1)
    assert (choose(many, draws, alpha=0.0) == 1).all() and (choose(many, draws, alpha=1e-4) == 1).all()
    for alpha, logits in ((0.5, values[0].double() / 0.5), (1e9, torch.zeros(4).double())):
        expected = logits.masked_fill(values[0].isnan(), -torch.inf).softmax(0)
        found = torch.bincount(choose(many, draws, alpha=alpha), minlength=4) / 40_000
        assert ((found - expected).abs() <= 4 * (expected * (1 - expected) / 40_000).sqrt()).all()
    assert choose(torch.full((1, 3), torch.nan), uniforms(1), alpha=0.5).item() in range(3)
    with pytest.raises(ValueError, match="negative"):
        choose(values, uniforms(1), alpha=-1.0)
