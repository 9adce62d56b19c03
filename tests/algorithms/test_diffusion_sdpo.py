"""The safeguard of Diffusion-SDPO."""

import pytest
import torch
from linear_models import BETA, PAIRS, Model, assert_equal, random, tensor

from diffusers_align.algorithms.diffusion_dpo import diffusion_dpo_loss
from diffusers_align.algorithms.diffusion_sdpo import safeguard_scale, scale_gradient
from diffusers_align.rl.matching import error_coefficients


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("mu", [0.0, 0.6, 1.0])
def test_the_safeguard_keeps_a_share_of_the_winners_progress(mu, per_sample):
    residual_w, residual_l = random(8, 3, 2), random(8, 3, 2, seed=1) + 3 * random(8, 3, 2) * tensor(1, -1).repeat(4)[:, None, None]
    scale = safeguard_scale(residual_w, residual_l, mu=mu, per_sample=per_sample)
    own, shared = residual_w.square().flatten(1).sum(1), (residual_w * residual_l).flatten(1).sum(1)
    if not per_sample:
        own, shared = own.sum().expand(8), shared.sum().expand(8)
    left = own - scale * shared
    assert (left >= mu * own - 1e-12).all() and ((scale >= 0) & (scale <= 1)).all()
    active = scale < 1
    assert_equal(left[active], mu * own[active], atol=1e-12)
    if per_sample:
        assert (scale[1::2] == 1).all() and active[::2].all(), "only losers that pull against the winner are held"


def test_the_official_lambda():
    pred_w, pred_l = (random(4, 6, seed=s).requires_grad_() for s in (0, 1))
    target_w, target_l = random(4, 6, seed=2), random(4, 6, seed=2)
    pred_l = (target_l + 2 * (pred_w - target_w) + (pred_l - target_l)).detach().requires_grad_()
    grads = [torch.autograd.grad(((p - t) ** 2).mean(), p)[0] for p, t in ((pred_w, target_w), (pred_l, target_l))]
    dot, norm = (grads[0] * grads[1]).sum(), grads[0].square().sum()
    expected = ((1 - 0.6) * norm / dot).clamp(0, 1) if dot > 0 else torch.ones(())
    assert 0 < expected < 1
    assert_equal(safeguard_scale(pred_w - target_w, pred_l - target_l, mu=0.6), expected.expand(4))


def test_the_safeguard_changes_no_value_and_scales_the_losers_gradient():
    model, scale = Model(), torch.rand(PAIRS, generator=torch.Generator().manual_seed(0)).double()
    w, l_, rw, rl = model.errors()
    guarded = diffusion_dpo_loss(w, scale_gradient(l_, scale), rw, rl, beta=BETA)
    assert (guarded == diffusion_dpo_loss(w, l_, rw, rl, beta=BETA)).all()
    _, (of_w, of_l) = error_coefficients(lambda a, b: diffusion_dpo_loss(a, b, rw, rl, beta=BETA), w, l_)
    assert_equal(model.gradient(guarded.mean()), model.gradient((of_w * w + scale * of_l * l_).sum()))


def test_a_perfect_winner_is_not_divided_by():
    zero, one = torch.zeros(2, 3), torch.ones(2, 3)
    assert_equal(safeguard_scale(zero, one, mu=0.5), [1.0, 1.0])
    with pytest.raises(ValueError, match="mu is the share"):
        safeguard_scale(one, one, mu=1.5)
