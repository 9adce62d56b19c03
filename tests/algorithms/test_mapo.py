"""MaPO against its official code."""

import torch
from linear_models import Model, assert_equal, tensor
from torch.nn import functional as F

from diffusers_align.algorithms.diffusion_dpo import preference_logit
from diffusers_align.algorithms.mapo import likelihood_score, mapo_loss, mapo_margin


def test_mapo_is_the_official_formula():
    w, l_, *_ = Model().errors()
    score = [(0.5 * e) / (torch.exp(0.5 * e) - 1) for e in (w, l_)]
    log_odds = score[0] - score[1]
    assert_equal(mapo_loss(w, l_), w - 0.1 * F.logsigmoid(1000 * log_odds), atol=1e-10)


def test_mapo_score_near_zero_and_far_away():
    x = torch.tensor([0.0, 1e-12, 0.19, 0.2, 0.21, 3.0, 5000.0], dtype=torch.float64, requires_grad=True)
    score = likelihood_score(x)
    assert score[0] == 1 and score[-1] == 0
    assert_equal(score[2:6].detach(), (0.5 * x[2:6] / torch.expm1(0.5 * x[2:6])).detach(), atol=1e-14)
    gradient = torch.autograd.grad(score.sum(), x)[0]
    assert gradient.isfinite().all() and gradient[0] == -0.25
    assert torch.autograd.gradcheck(likelihood_score, x[:6].detach().abs().requires_grad_())


def test_mapo_margin_is_dpos_at_beta_500():
    w, l_ = tensor(0.010, 0.02), tensor(0.0200, 0.01)
    margin = mapo_margin(w, l_)
    logit = preference_logit(w, l_, torch.zeros(2), torch.zeros(2), beta=500.0)
    assert_equal(logit, [2.5, -2.5])
    torch.testing.assert_close(margin, logit, rtol=0.01, atol=0)
