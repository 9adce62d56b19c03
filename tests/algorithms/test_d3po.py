"""D3PO's loss, its clips and its steps."""

import math

import pytest
import torch
from linear_models import assert_equal, random, tensor
from torch.nn import functional as F

from diffusers_align.algorithms.d3po import d3po_loss, d3po_metrics, sampled_steps, step_logit
from diffusers_align.algorithms.spo import spo_loss


def d3po_clips(gain_w, gain_l, clip):
    """Loss, and its gradient by the two gains."""
    gains = [tensor(gain).requires_grad_() for gain in (gain_w, gain_l)]
    loss = d3po_loss(*(100 * g for g in gains), torch.zeros(1), torch.zeros(1), per_dim=100, beta=10.0, clip=clip)
    return loss.item(), [g.item() for g in torch.autograd.grad(loss.sum(), gains)]


def test_the_official_clamp_kills_gradients_on_both_sides():
    for gain_w, gain_l, alive in ((0.0, 0.0, (1, 1)), (0.2, 0.0, (0, 1)), (-0.2, 0.0, (0, 1)), (0.0, 0.2, (1, 0)), (0.0, -0.2, (1, 0)), (-0.2, 0.2, (0, 0))):
        _, gradients = d3po_clips(gain_w, gain_l, "official")
        assert tuple(int(g != 0) for g in gradients) == alive


def test_the_one_sided_clip_brings_back_what_went_wrong():
    for gain_w, gain_l, alive in ((0.0, 0.0, (1, 1)), (0.2, 0.0, (0, 1)), (-0.2, 0.0, (1, 1)), (0.0, 0.2, (1, 1)), (0.0, -0.2, (1, 0)), (-0.2, 0.2, (1, 1))):
        _, gradients = d3po_clips(gain_w, gain_l, "one_sided")
        assert tuple(int(g != 0) for g in gradients) == alive
        assert gradients[0] <= 0 <= gradients[1]
    assert d3po_clips(0.2, -0.2, "none")[1][0] < 0 < d3po_clips(0.2, -0.2, "none")[1][1]


def test_d3po_is_the_official_formula_within_the_clip():
    log_probs = 5 * random(4, 9)
    ratio_w, ratio_l = ((log_probs[i] - log_probs[i + 2]).div(100).exp() for i in (0, 1))
    expected = -torch.log(torch.sigmoid(0.1 * torch.log(ratio_w.clamp(0.9, 1.1)) - 0.1 * torch.log(ratio_l.clamp(0.9, 1.1))))
    assert not ((ratio_w > 1.1) | (ratio_w < 0.9)).all() and ((ratio_w > 1.1) | (ratio_w < 0.9)).any()
    assert_equal(d3po_loss(*log_probs, per_dim=100, clip="official"), expected)


@pytest.mark.parametrize("loss, beta, bound", [(d3po_loss, 0.1, 0.020067), (spo_loss, 10.0, 2.0067)])
def test_how_far_the_official_clamp_lets_the_logit_go(loss, beta, bound):
    far = [torch.full((1,), value, dtype=torch.float64) for value in (900.0, -900.0, 0.0, 0.0)]
    logit = step_logit(*far, per_dim=1, beta=beta, clip="official")
    assert_equal(logit, [beta * math.log(1.1 / 0.9)])
    assert logit.item() == pytest.approx(bound, rel=1e-4)
    assert_equal(loss(*far, per_dim=1, clip="official"), -F.logsigmoid(logit))
    backwards = [far[1], far[0], *far[2:]]
    assert loss(*backwards, per_dim=1, clip="none").isfinite()


@pytest.mark.parametrize("clip, fraction", [("official", 5 / 8), ("one_sided", 3 / 8), ("none", 0)])
def test_d3po_metrics(clip, fraction):
    gain_w, gain_l = tensor(0.2, -0.2, 0.0, 0.3), tensor(0.0, 0.2, 0.0, -0.3)
    metrics = d3po_metrics(100 * gain_w, 100 * gain_l, torch.zeros(4), torch.zeros(4), per_dim=100, beta=2.0, clip=clip)
    assert metrics == pytest.approx({"accuracy": 2.5 / 4, "margin": 2 * (0.2 - 0.4 + 0 + 0.6) / 4, "clip_fraction": fraction})


def test_step_losses_gradcheck():
    log_probs = [x.requires_grad_() for x in random(4, 5)]
    assert torch.autograd.gradcheck(lambda *x: d3po_loss(*x, per_dim=2, beta=3.0, clip="none"), log_probs)


def test_sampled_steps_depend_on_the_seed_alone():
    steps = [1, 2, 3, 5, 8, 9]
    draws = [sampled_steps(steps, 3, seed=seed) for seed in range(200)]
    assert draws[0] == sampled_steps(tuple(steps), 3, seed=0)
    assert all(draw == sorted(set(draw)) and len(draw) == 3 and set(draw) <= set(steps) for draw in draws)
    counts = [sum(step in draw for draw in draws) for step in steps]
    assert min(counts) > 70 and max(counts) < 130
    assert sampled_steps(steps, 6, seed=1) == steps
    with pytest.raises(ValueError, match="1 to 6"):
        sampled_steps(steps, 7, seed=0)
    with pytest.raises(ValueError, match="No step has noise"):
        sampled_steps([], 0, seed=0)
