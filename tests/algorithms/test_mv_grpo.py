"""MV-GRPO: the loss over views."""

import math

import pytest
import torch

from diffusers_align.algorithms.flow_grpo import flow_grpo_loss
from diffusers_align.algorithms.mv_grpo import mv_grpo_loss


def double(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- the loss ----------------------------------------------------------------------------------------------------------


def test_the_loss_by_hand():
    log_ratio, advantage = 64 * double(2e-4, 2e-4, -5e-5), double(1.5, -1.5, 2.0)
    loss = mv_grpo_loss(log_ratio, torch.zeros(3, dtype=torch.float64), advantage, num_views=3, per_dim=64)
    torch.testing.assert_close(loss, double(-0.50005, 0.5 * math.exp(2e-4), -2 / 3 * math.exp(-5e-5)), rtol=1e-14, atol=0)


@pytest.mark.parametrize("views", [1, 2, 4])
def test_equal_views_have_exactly_flow_grpos_gradient(views):
    generator = torch.Generator().manual_seed(0)
    log_prob, old, advantage = (torch.randn(32, generator=generator, dtype=torch.float64) for _ in range(3))
    arguments = {"per_dim": 8, "clip_range": 0.1}
    expected = torch.autograd.grad(flow_grpo_loss(log_prob.requires_grad_(), old, advantage, **arguments).sum(), log_prob)[0]
    total = sum(mv_grpo_loss(log_prob, old, advantage, num_views=views, **arguments) for _ in range(views))
    assert torch.equal(torch.autograd.grad(total.sum(), log_prob)[0], expected) and expected.abs().max() > 0
