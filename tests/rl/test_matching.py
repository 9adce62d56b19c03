"""Matching errors and their coefficients."""

import math

import pytest
import torch
from linear_models import LOSSES, PAIRS, Model, assert_equal, random

from diffusers_align.algorithms.diffusion_dpo import diffusion_dpo_loss
from diffusers_align.algorithms.diffusion_kto import kto_loss
from diffusers_align.algorithms.dspo import dspo_loss
from diffusers_align.algorithms.linear_dpo import linear_dpo_loss, linear_weight
from diffusers_align.algorithms.mapo import mapo_loss
from diffusers_align.rl.matching import error_coefficients, matching_error


@pytest.mark.parametrize("name", LOSSES)
def test_order_and_micro_batches_do_not_matter(name):
    model, order = Model(), torch.tensor([3, 1, 5, 0, 2, 4])
    inputs = [*model.errors(), model.ref_distance()]
    whole = LOSSES[name](*inputs)
    assert whole.shape == (PAIRS,)
    assert_equal(LOSSES[name](*[e[order] for e in inputs]), whole[order])
    pieces = [LOSSES[name](*[e[rows] for e in inputs]) for rows in (slice(0, 2), slice(2, 6))]
    assert_equal(sum(model.gradient(piece.sum()) for piece in pieces) / PAIRS, model.gradient(whole.mean()))


@pytest.mark.parametrize("name", LOSSES)
def test_two_passes_have_the_gradient_of_one(name):
    model = Model()
    error_w, error_l, ref_error_w, ref_error_l = model.errors()
    with torch.no_grad():
        first_pass = [*model.errors()[:2], model.ref_distance()]
    loss, coefficients = error_coefficients(lambda w, l_, k: LOSSES[name](w, l_, ref_error_w, ref_error_l, k), *first_pass)
    assert not loss.requires_grad and not any(c.requires_grad for c in coefficients)
    one_pass = LOSSES[name](error_w, error_l, ref_error_w, ref_error_l, model.ref_distance())
    assert_equal(loss, one_pass)
    gradient = 0
    for rows in (slice(0, 2), slice(2, 6)):
        for error, coefficient in zip([*model.errors()[:2], model.ref_distance()], coefficients):
            gradient = gradient + model.gradient((coefficient[rows] * error[rows]).sum())
    assert_equal(gradient, model.gradient(one_pass.mean()))
    assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name):
    inputs = [e.detach().requires_grad_() for e in (*Model().errors(), Model().ref_distance())]
    if name == "linear":  # its weight is held, so it is no function of the errors that finite differences could see
        actual = torch.autograd.grad(LOSSES[name](*inputs).sum(), inputs[:2])
        weight = linear_weight(*inputs[:4], beta=0.5)
        assert_equal(torch.stack(actual), torch.stack([weight, -weight]))
    else:
        assert torch.autograd.gradcheck(LOSSES[name], inputs, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_may_be_in_half_precision_but_errors_are_not(dtype):
    output, target = random(64, 256).to(dtype), random(64, 256, seed=1).to(dtype)
    error = matching_error(output, target)
    assert error.dtype == torch.float32
    assert_equal(error.double(), (output.double() - target.double()).square().mean(1), atol=1e-5)
    assert (diffusion_dpo_loss(error, error, error, error, beta=5000.0) == torch.tensor(math.log(2))).all()
    rounded = error.to(dtype)
    for loss in (
        lambda: diffusion_dpo_loss(rounded, error, error, error, beta=1.0),
        lambda: mapo_loss(error, rounded),
        lambda: linear_dpo_loss(error, error, error, rounded, beta=1.0),
        lambda: dspo_loss(error, error, rounded, error, error, beta=1.0),
        lambda: kto_loss(rounded, error, torch.ones(64), 0.0, beta=1.0),
    ):
        with pytest.raises(TypeError, match="Square in float32"):
            loss()


def test_what_half_precision_would_do_to_the_logit():
    target = random(200, 4096)
    outputs = [target + scale * random(200, 4096, seed=seed) for seed, scale in ((1, 0.3), (2, 0.31))]
    exact = [matching_error(output, target) for output in outputs]
    rounded_outputs = [matching_error(output.bfloat16(), target) for output in outputs]
    noise = [-2500 * ((e[0] - e[1]) - (exact[0] - exact[1])) for e in (rounded_outputs, [e.bfloat16().double() for e in exact])]
    assert noise[0].std() < 0.1 < 0.5 < noise[1].std()


def test_matching_error_is_in_float32_at_least():
    output, target = torch.full((2, 3, 4), 1.0, dtype=torch.bfloat16), torch.zeros(2, 3, 4)
    output[1] = 3
    error = matching_error(output, target)
    assert error.dtype == torch.float32 and error.tolist() == [1.0, 9.0]


def test_errors_that_are_not_one_a_sample_are_refused():
    """Of images as they come from mse_loss(reduction="none"), each pixel would be a pair of its own; (B, 1) beside (B,) makes each pair with each."""
    errors, images = torch.rand(2), torch.rand(2, 3, 4, 4)
    for call in (
        lambda: diffusion_dpo_loss(images, images, images, images, beta=1.0),
        lambda: diffusion_dpo_loss(errors, errors, errors[:, None], errors, beta=1.0),
        lambda: kto_loss(images, images, torch.ones(2), 0.0, beta=1.0),
        lambda: mapo_loss(errors, errors[:1]),
    ):
        with pytest.raises(ValueError, match=r"Errors are one number a sample, \(B,\)"):
            call()
