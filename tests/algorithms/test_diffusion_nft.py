"""DiffusionNFT: the loss against its formula, and the policy that lags behind."""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from linear_models import assert_equal, random

from diffusers_align import sde_twin
from diffusers_align.algorithms.advantage_weighted_matching import lagging_decay, pseudo_log_prob
from diffusers_align.algorithms.diffusion_nft import ADVANTAGE_MODES, nft_loss, old_policy_decay, optimality
from diffusers_align.forward_process import ForwardProcess

PROCESSES = {
    "flow": ForwardProcess(sde_twin(FlowMatchEulerDiscreteScheduler(shift=3.0))),
    **{kind: ForwardProcess(sde_twin(DDIMScheduler(prediction_type=kind))) for kind in ("epsilon", "v_prediction", "sample")},
}


# --- DiffusionNFT ------------------------------------------------------------------------------------------------------


def test_nft_by_hand():
    x0_hat, old, x0 = (torch.tensor([row], dtype=torch.float64) for row in ([1, -3], [0, 1], [0, 0]))
    # v+ predicts (1, -3), with mean square 5 and mean size 2; v- predicts (-1, 5): 13 and 3.
    assert_equal(nft_loss(x0_hat, old, x0, torch.tensor([0.75])), [5 * (0.75 * 5 / 2 + 0.25 * 13 / 3)])
    assert_equal(nft_loss(x0_hat, old, x0, torch.tensor([0.75]), adaptive=False), [5 * (0.75 * 5 + 0.25 * 13)])


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_nft_is_the_official_formula_in_velocities(beta):
    forward, r, t = PROCESSES["flow"], torch.tensor([0.1, 0.5, 0.9]).double(), torch.tensor([900.0, 500.0, 30.0]).double()
    x0, noise, v, v_old = random(4, 3, 2, 4, 4)
    x_t, s = forward.add_noise(x0, noise, t), (t / 1000).reshape(3, 1, 1, 1)
    expected = 0
    for weight, velocity in ((r, beta * v + (1 - beta) * v_old), (1 - r, (1 + beta) * v_old - beta * v)):
        error = (x_t - s * velocity) - x0
        expected = expected + weight * (error**2 / error.abs().mean((1, 2, 3), keepdim=True).clip(min=1e-5)).mean((1, 2, 3)) / beta * 5
    assert_equal(nft_loss(forward.to_x0(v, x_t, t), forward.to_x0(v_old, x_t, t), x0, r, beta=beta), expected)


def gradient_of_nft(forward, x0, noise, t, output, old, r, **options):
    x_t, output = forward.add_noise(x0, noise, t), output.clone().requires_grad_()
    loss = nft_loss(forward.to_x0(output, x_t, t), forward.to_x0(old, x_t, t), x0, r, **options)
    return torch.autograd.grad(loss.sum(), output)[0]


@pytest.mark.parametrize("kind", PROCESSES)
@pytest.mark.parametrize("beta", [1.0, 0.25])
def test_the_optimum_lies_from_the_old_policy_towards_the_sample_or_away_from_it(kind, beta):
    forward, r, t = PROCESSES[kind], torch.tensor([0.0, 0.3, 1.0]).double(), torch.tensor([900, 500, 30])
    x0, noise, old = random(3, 3, 2, 3)
    target = forward.target(x0, noise, t)
    optimum = old + (2 * r[:, None, None] - 1) * (target - old) / beta
    assert gradient_of_nft(forward, x0, noise, t, optimum, old, r, beta=beta, adaptive=False).abs().max() < 1e-9
    assert gradient_of_nft(forward, x0, noise, t, old, old, r, beta=beta, adaptive=False).abs().max() > 1e-3


@pytest.mark.parametrize("kind", PROCESSES)
def test_an_average_sample_leaves_the_old_policy_where_it_is(kind):
    forward, t = PROCESSES[kind], torch.tensor([900, 500, 30])
    x0, noise, old = random(3, 3, 2, 3)
    assert gradient_of_nft(forward, x0, noise, t, old, old, torch.full((3,), 0.5).double()).abs().max() < 1e-12
    better = gradient_of_nft(forward, x0, noise, t, old, old, torch.full((3,), 0.6).double())
    assert ((better * (forward.target(x0, noise, t) - old)).sum((1, 2)) < 0).all(), "descent goes towards the sample"


def test_the_adaptive_weight_has_no_gradient_and_a_floor():
    x0 = random(2, 3)
    x0_hat = x0.clone().requires_grad_()
    loss = nft_loss(x0_hat, x0, x0, torch.ones(2).double())
    assert loss.abs().max() == 0 and torch.autograd.grad(loss.sum(), x0_hat)[0].abs().max() == 0
    shifted = (x0 + 0.3).requires_grad_()
    # (x+ - x0)^2 / w with w held: 2 * 0.3 / 0.3 over three dimensions, times 5.
    assert_equal(torch.autograd.grad(nft_loss(shifted, x0, x0, torch.ones(2).double()).sum(), shifted)[0], torch.full((2, 3), 10 / 3, dtype=torch.float64))


@pytest.mark.parametrize(
    "mode, expected",
    [
        ("all", [0, 0.3, 0.5, 0.6, 1]),
        ("positive_only", [0.5, 0.5, 0.5, 0.6, 1]),
        ("negative_only", [0, 0.3, 0.5, 0.5, 0.5]),
        ("one_only", [0.5, 0.5, 0.5, 0.6, 0.6]),
        ("binary", [0.4, 0.4, 0.5, 0.6, 0.6]),
    ],
)
def test_optimality(mode, expected):
    assert mode in ADVANTAGE_MODES
    assert_equal(optimality(torch.tensor([-9.0, -2, 0, 1, 7]).double(), mode=mode), expected)


def test_decays():
    assert [old_policy_decay(step) for step in (0, 100, 500, 900)] == [0, 0.1, 0.5, 0.5]
    assert [old_policy_decay(step, "type2") for step in (75, 76, 1000)] == [0, 0.0075, 0.999]
    assert old_policy_decay(1000, "type0") == 0
    assert [lagging_decay(step) for step in (0, 100, 900)] == [0, 0.1, 0.3]


# --- AWM ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: optimality(x, mode="some"), "Unknown mode 'some'; choose one of all"),
        (lambda x: old_policy_decay(1, "type3"), "Unknown schedule 'type3'; choose type0"),
        (lambda x: pseudo_log_prob(x, x, x, weighting="snr"), "Unknown weighting 'snr'; choose one of uniform"),
    ],
)
def test_unknown_names_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(1, 1))
