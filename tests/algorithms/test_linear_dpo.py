"""Linear-DPO against its official code."""

import torch
from linear_models import BETA, Model, assert_equal

from diffusers_align.algorithms.diffusion_dpo import diffusion_dpo_loss
from diffusers_align.algorithms.linear_dpo import linear_dpo_loss


def test_linear_dpo_is_the_official_formula():
    w, l_, rw, rl = Model().errors()
    weight = torch.clamp(0.2 * BETA * ((w - l_) - (rw - rl)) + 0.5, 0.0581, 1 - 0.0581).detach()
    assert len(weight.unique()) == 4 and weight.min() == 0.0581 and weight.max() == 1 - 0.0581
    assert_equal(linear_dpo_loss(w, l_, rw, rl, beta=BETA, eta=0.0581), weight * (w - l_))


def test_linear_dpo_at_the_reference():
    model = Model(at_reference=True)
    linear = model.gradient(linear_dpo_loss(*model.errors(), beta=BETA).mean())
    assert_equal(linear, 0.5 * model.gradient((model.errors()[0] - model.errors()[1]).mean()))
    assert_equal(linear, 2 / BETA * model.gradient(diffusion_dpo_loss(*model.errors(), beta=BETA).mean()))
