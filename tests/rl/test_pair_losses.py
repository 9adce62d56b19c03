"""Losses of a pair's logit, and pairs from scores."""

import math

import pytest
import torch
from linear_models import NAN, assert_equal, random, tensor

from diffusers_align.rl.pair_losses import PAIR_LOSSES, pair_loss, ranked_pairs


def test_hinge_and_ipo_by_hand():
    zero = torch.zeros(1).double()
    assert pair_loss(zero, kind="hinge") == 1
    assert_equal(pair_loss(tensor(-1, 0.25, 1, 3), kind="hinge"), [2, 0.75, 0, 0])
    for tau in (0.5, 0.1):
        assert_equal(pair_loss(zero, kind="ipo", ipo_tau=tau), [1 / (4 * tau**2)])
        assert_equal(pair_loss(tensor(1 / (2 * tau)), kind="ipo", ipo_tau=tau), [0.0])
        assert_equal(pair_loss(tensor(1 / (2 * tau) - 2), kind="ipo", ipo_tau=tau), [4.0])


@pytest.mark.parametrize("alpha", [0.01, 0.3])
def test_dmpo_is_a_reverse_kl(alpha):
    z = tensor(-4, -1, 0, 2, 5).requires_grad_()
    p, q = torch.sigmoid(z), 1 - alpha
    loss = pair_loss(z, kind="dmpo", dmpo_alpha=alpha)
    assert_equal(loss, (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).detach(), atol=1e-10)
    assert_equal(torch.autograd.grad(loss.sum(), z)[0], (p * (1 - p) * (z - math.log(q / (1 - q)))).detach(), atol=1e-10)
    optimum = torch.tensor([math.log(q / (1 - q))], dtype=torch.float64, requires_grad=True)
    at_optimum = pair_loss(optimum, kind="dmpo", dmpo_alpha=alpha)
    assert at_optimum.abs() < 1e-12 and torch.autograd.grad(at_optimum, optimum)[0].abs() < 1e-12


@pytest.mark.parametrize("kind", PAIR_LOSSES)
def test_every_kind_is_finite_and_asks_for_a_larger_logit_at_zero(kind):
    z = torch.tensor([-800.0, 0.0, 800.0], dtype=torch.float64, requires_grad=True)
    loss = pair_loss(z, kind=kind)
    gradient = torch.autograd.grad(loss.sum(), z)[0]
    assert loss.isfinite().all() and gradient.isfinite().all() and gradient[1] < 0


@pytest.mark.parametrize("kind", PAIR_LOSSES)
def test_soft_labels(kind):
    z, p = random(7), torch.rand(7, generator=torch.Generator().manual_seed(1)).double()
    assert_equal(pair_loss(z, kind=kind, label=p), p * pair_loss(z, kind=kind) + (1 - p) * pair_loss(-z, kind=kind))
    assert_equal(pair_loss(z, kind=kind, label=p), pair_loss(-z, kind=kind, label=1 - p))
    assert_equal(pair_loss(z, kind=kind, label=1.0), pair_loss(z, kind=kind))
    smoothed = pair_loss(z, kind=kind, label_smoothing=0.1)
    assert_equal(smoothed, pair_loss(z, kind=kind, label=0.9))
    assert_equal(pair_loss(z, kind=kind, label=p, label_smoothing=0.1), pair_loss(z, kind=kind, label=0.9 * p + 0.1 * (1 - p)))


@pytest.mark.parametrize("p", [0.5, 0.8])
def test_the_optimum_of_a_soft_label_is_its_logit(p):
    z = tensor(math.log(p / (1 - p))).requires_grad_()
    loss = pair_loss(z, label=p)
    assert torch.autograd.grad(loss.sum(), z)[0].abs() < 1e-15
    assert (pair_loss(z.detach() + tensor(-0.1, 0.1), label=p) > loss).all()


def test_kinds_and_labels_that_do_not_exist():
    with pytest.raises(ValueError, match="sigmoid, hinge, ipo, dmpo"):
        pair_loss(tensor(0), kind="huber")
    with pytest.raises(ValueError, match="0.5 a tie"):
        pair_loss(tensor(0, 1), label=tensor(0.5, -1))


def test_pairs_from_scores():
    scores, groups = tensor(3, 1, NAN, 2, 5, 5, 4, 7), torch.tensor([0, 0, 0, 0, 1, 1, 1, 2])
    winners, losers = ranked_pairs(scores, groups)
    assert set(zip(winners.tolist(), losers.tolist())) == {(0, 1), (0, 3), (3, 1), (4, 6), (5, 6)} and len(winners) == 5
    winners, losers = ranked_pairs(scores, groups, kind="extremes")
    assert list(zip(winners.tolist(), losers.tolist())) == [(0, 1), (4, 6)]
    assert set(zip(*(side.tolist() for side in ranked_pairs(scores, groups, min_gap=1.0)))) == {(0, 1)}
    with pytest.raises(ValueError, match="extremes"):
        ranked_pairs(scores, groups, kind="best")
