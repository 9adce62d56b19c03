"""AWM: the loss against its formula."""

import math

import pytest
import torch
from linear_models import assert_equal, random

from diffusers_align.algorithms.advantage_weighted_matching import WEIGHTINGS, awm_loss, pseudo_log_prob, unit_advantages


def test_pseudo_log_prob_by_hand():
    output, target, time = torch.tensor([[1.0, 3.0]]).double(), torch.tensor([[0.0, 0.0]]).double(), torch.tensor([0.5])
    expected = {"uniform": -5, "t": -2.5, "t2": -1.25, "huber": -0.5 * math.sqrt(5), "ghuber": -0.5 * (5**0.25 - 1e-10**0.25) / 0.25}
    for weighting in WEIGHTINGS:
        assert_equal(pseudo_log_prob(output, target, time, weighting=weighting), [expected[weighting]], atol=1.1e-5 if weighting == "huber" else 1e-9)
    assert_equal(pseudo_log_prob(output, target, time), [expected["ghuber"]], atol=1e-9)
    assert_equal(pseudo_log_prob(output, target, time, ghuber_power=1.0), [-2.5], atol=1e-9)
    assert_equal(pseudo_log_prob(output.float().bfloat16(), target, time, weighting="t"), [-2.5])
    for weighting in ("huber", "ghuber"):
        at_zero = target.clone().requires_grad_()
        value = pseudo_log_prob(at_zero, target, time, weighting=weighting)
        assert value.abs() < 1e-12 and torch.autograd.grad(value.sum(), at_zero)[0].isfinite().all()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_first_update_is_the_advantage_weighted_pretraining_gradient(weighting):
    output, target, time, advantage = random(4, 3).requires_grad_(), random(4, 3, seed=1), torch.rand(4).double(), random(4, seed=2)
    log_prob = pseudo_log_prob(output, target, time, weighting=weighting)
    actual = torch.autograd.grad(awm_loss(log_prob, log_prob.detach(), advantage).sum(), output, retain_graph=True)[0]
    assert_equal(actual, -torch.autograd.grad((advantage * log_prob).sum(), output)[0])
    assert actual.abs().max() > 1e-3


def test_only_ratios_above_two_are_clipped():
    log_ratio = torch.tensor([-5.0, 0.6, 0.8, 0.8], dtype=torch.float64, requires_grad=True)
    loss = awm_loss(log_ratio, torch.zeros(4).double(), torch.tensor([1.0, 1, 1, -1]).double())
    assert_equal(loss, [-math.exp(-5), -math.exp(0.6), -2, math.exp(0.8)])
    assert (torch.autograd.grad(loss.sum(), log_ratio)[0] != 0).tolist() == [True, True, False, True]


def test_unit_advantages():
    assert_equal(unit_advantages(torch.tensor([-7.0, 2.5, 5.0]).double()), [-1, 0.5, 1])
