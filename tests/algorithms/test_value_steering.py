"""The worth of candidates, the targets and the loss of value steering."""

import math

import pytest
import torch

from diffusers_align.algorithms.value_steering import candidates_value, q_targets, value_loss


def test_candidates_are_worth_their_best_or_a_soft_maximum():
    values = torch.tensor([[0.0, 1.0], [2.0, 2.0]])
    assert candidates_value(values).tolist() == [1.0, 2.0]
    soft = candidates_value(values, alpha=0.5)
    assert soft[0].item() == pytest.approx(0.5 * math.log((1 + math.e**2) / 2)) and soft[1].item() == pytest.approx(2)
    assert torch.allclose(candidates_value(values, alpha=1e-3), candidates_value(values), atol=1e-3)
    assert torch.allclose(candidates_value(values, alpha=1e3), values.mean(1), atol=1e-3)
    assert torch.equal(candidates_value(values, alpha=math.inf), values.mean(1))
    with pytest.raises(ValueError, match="negative"):
        candidates_value(values, alpha=-1.0)


def test_targets_are_what_was_earned_or_what_the_next_candidates_promise():
    rewards, worth = torch.tensor([1.0, torch.nan]), torch.tensor([[9.0, 0.2, 0.4], [9.0, 0.2, 0.4]])
    assert q_targets(rewards, worth)[0].tolist() == [1.0, 1.0, 1.0]
    torch.testing.assert_close(q_targets(rewards, worth, lam=0.0)[0], torch.tensor([0.2, 0.4, 1.0]))
    half = q_targets(rewards, worth, lam=0.5)[0]
    torch.testing.assert_close(half, torch.tensor([0.5 * 0.2 + 0.5 * (0.5 * 0.4 + 0.5), 0.5 * 0.4 + 0.5, 1.0]))
    assert q_targets(rewards, worth)[1].isnan().all()


def test_the_loss_is_a_squared_error_in_float32():
    loss = value_loss(torch.tensor([1.0, 3.0], dtype=torch.bfloat16), torch.tensor([0.0, 1.0]))
    assert loss.tolist() == [1.0, 4.0] and loss.dtype == torch.float32
