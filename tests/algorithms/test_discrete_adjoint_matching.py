"""Discrete Adjoint Matching against the enumerated states of a masked diffusion."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from diffusers_align.algorithms.discrete_adjoint_matching import generalized_kl_loss, log_adjoint, log_weight

torch.set_num_threads(1)
SPEC = importlib.util.spec_from_file_location("discrete_example", Path(__file__).parents[2] / "benchmarks" / "discrete_adjoint_matching.py")
example = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(example)
BASE, ENERGY = example.Base(), (example.WORDS == 0).sum(1).double() + 0.3 * example.WORDS[:, 1]
TILTED = (BASE.law.log() - ENERGY).softmax(0)
VALUES = -(BASE.completions @ (-ENERGY).exp()).log()  # V(x) of each state
NEXT = example.number(example.after(example.STATES))  # (states, edges)


def optimal_log_rates(states):
    index = example.number(states)
    return BASE.log_rates(states) + VALUES[index][:, None] - VALUES[NEXT[index]]


def exact_log_adjoints():
    """(states, words, edges): of each state and final word, with the sum over all completions of each edge."""
    shape = (*NEXT.shape, len(ENERGY))
    weights = log_weight(ENERGY).expand(shape) + (len(ENERGY) * BASE.completions[NEXT]).log()
    each = [log_adjoint(weights, log_weight(ENERGY[word]).expand(len(NEXT), 1), max_log_weight=math.inf) for word in range(len(ENERGY))]
    return torch.stack(each, 1)


def test_the_bases_rates_write_its_words():
    torch.testing.assert_close(example.law_of(BASE.log_rates), BASE.law, rtol=0, atol=1e-14)


def test_the_optimal_rates_write_the_tilted_words():
    torch.testing.assert_close(example.law_of(optimal_log_rates), TILTED, rtol=0, atol=1e-14)
    assert example.kl(BASE.law, TILTED) > 0.1


def test_masked_diffusion_keeps_its_schedule():
    """The tilted rates of a position sum to the base's."""
    sums = [rates(example.STATES).exp().unflatten(1, (example.LENGTH, example.LETTERS)).sum(-1) for rates in (BASE.log_rates, optimal_log_rates)]
    torch.testing.assert_close(*sums, rtol=0, atol=1e-14)


def test_the_mean_adjoint_of_the_tilted_chain_is_the_ratio_of_values():
    tilted = BASE.completions * (-ENERGY).exp()
    tilted = tilted / tilted.sum(1, keepdim=True)  # p*(word | state)
    mean = torch.einsum("xw,xwe->xe", tilted, exact_log_adjoints().exp())
    exists = ~BASE.log_rates(example.STATES).isneginf()
    torch.testing.assert_close(mean[exists], (VALUES[:, None] - VALUES[NEXT]).exp()[exists], rtol=1e-12, atol=0)


def test_the_loss_is_least_at_the_mean_of_what_it_matches():
    base, adjoint = torch.tensor([[0.5, -1.0]]).double(), torch.tensor([[0.2, -0.4], [1.0, 0.3]]).double()
    mean = (base + adjoint).exp().mean(0, keepdim=True).log().requires_grad_()
    losses = generalized_kl_loss(mean.expand(2, 2), base.expand(2, 2), adjoint)
    (gradient,) = torch.autograd.grad(losses.sum(), mean)
    assert gradient.abs().max() < 1e-12 and losses.min() > 0
    exact = generalized_kl_loss(base + adjoint[:1], base, adjoint[:1])
    assert float(exact) == pytest.approx(0, abs=1e-15)
    # u - w + w log(w / u) by hand, at u = 1, w = 2
    assert float(generalized_kl_loss(torch.zeros(1, 1), torch.zeros(1, 1), torch.full((1, 1), math.log(2)))) == pytest.approx(2 * math.log(2) - 1)


def test_drawn_edges_have_the_mean_of_all():
    log_rate, base, adjoint = torch.randn(3, 1, 4, generator=torch.Generator().manual_seed(0)).double()
    whole, proposal = generalized_kl_loss(log_rate, base, adjoint), torch.tensor([0.1, 0.2, 0.3, 0.4]).double()
    single = [generalized_kl_loss(log_rate[:, [e]], base[:, [e]], adjoint[:, [e]], proposal=proposal[None, [e]]) for e in range(4)]
    torch.testing.assert_close(sum(q * term for q, term in zip(proposal, single)), whole)


def test_importance_weights_stand_for_the_base():
    """Completions by another chain, weighted: the mean of many is the sum over all by the base."""
    generator, state = torch.Generator().manual_seed(0), 0
    other = (0.3 * torch.randn(len(NEXT), len(ENERGY), generator=generator).double() + (BASE.completions + 1e-300).log()).softmax(1)

    def weights(row):
        drawn = torch.multinomial(other[row], 40_000, replacement=True, generator=generator)
        return log_weight(ENERGY[drawn], BASE.completions[row, drawn].log(), other[row, drawn].log())

    found = log_adjoint(torch.stack([weights(row) for row in NEXT[state]])[None], weights(state)[None])
    torch.testing.assert_close(found[0], VALUES[state] - VALUES[NEXT[state]], rtol=0, atol=0.03)


def test_weights_are_bounded_and_edges_must_agree():
    huge = log_adjoint(torch.full((1, 1, 1), 200.0), torch.zeros(1, 1))
    assert float(huge) == 30.0 and float(-log_adjoint(torch.full((1, 1, 1), -200.0), torch.zeros(1, 1))) == 30.0
    none = torch.tensor([[-torch.inf, 0.0]])
    rate = none.clone().requires_grad_()
    generalized_kl_loss(rate, none, torch.ones(1, 2)).sum().backward()
    assert rate.grad.tolist() == [[0.0, pytest.approx(1 - math.e)]]
    with pytest.raises(ValueError, match="different edges"):
        generalized_kl_loss(torch.zeros(1, 2), none, torch.ones(1, 2))


def test_the_example_learns():
    before, after = example.train(ENERGY, updates=60, batch=128, completions=8)
    assert before > 0.1 and after < 0.05 * before
