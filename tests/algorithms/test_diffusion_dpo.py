"""Diffusion-DPO: identities in float64 with a linear model, where every number can be had a second way."""

import math

import pytest
import torch
from linear_models import BETA, PAIRS, PROCESSES, TIMES, D, Model, assert_equal, noised, official, random, tensor
from torch.nn import functional as F

from diffusers_align.algorithms.d3po import step_logit
from diffusers_align.algorithms.diffusion_dpo import describe_beta, diffusion_dpo_loss, preference_logit, preference_metrics
from diffusers_align.algorithms.diffusion_kto import kto_loss
from diffusers_align.rl.matching import error_coefficients, matching_error
from diffusers_align.rl.pair_losses import pair_loss

# --- Diffusion-DPO ---------------------------------------------------------------------------------------------------------


def test_the_official_formula():
    model = Model()
    inside, loss, accuracy = official(*model.errors(), BETA)
    assert_equal(preference_logit(*model.errors(), beta=BETA), inside)
    assert_equal(diffusion_dpo_loss(*model.errors(), beta=BETA).mean(), loss)
    metrics = preference_metrics(*model.errors(), beta=BETA)
    assert metrics["accuracy"] == pytest.approx(float(accuracy)) and 0 < metrics["accuracy"] < 1
    assert metrics["margin"] == pytest.approx(inside.mean().item())
    assert metrics["gradient_weight"] == pytest.approx((1 - torch.sigmoid(inside)).mean().item())
    assert metrics["logistic"] == pytest.approx(-torch.log(torch.sigmoid(inside)).mean().item())


def test_metrics_by_hand():
    metrics = preference_metrics(tensor(1, 2, 3), tensor(2, 2, 2), tensor(1.5, 2, 2), tensor(1, 2, 3), beta=2.0)
    expected = {"error_w": 2, "error_l": 2, "error_w_change": 0.5 / 3, "error_l_change": 0, "accuracy": 0.5, "margin": (1.5 + 0 - 2) / 3}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    errors = tensor(1, 2, 3), tensor(2, 2, 2), tensor(1.5, 2, 2), tensor(1, 2, 3)
    decided = preference_metrics(*errors, beta=2.0, label=tensor(0.7, 1, 0.5))
    assert decided["accuracy"] == 0.75 and decided["margin"] == 0.75 and decided["error_w"] == 2, "a tie has no winner to prefer"
    assert not {"accuracy", "margin"} & preference_metrics(*errors, beta=2.0, label=tensor(0.5, 0.5, 0.5)).keys()


def test_at_the_reference_the_loss_is_log_2():
    model = Model(at_reference=True)
    loss, metrics = diffusion_dpo_loss(*model.errors(), beta=BETA), preference_metrics(*model.errors(), beta=BETA)
    assert (loss == math.log(2)).all()
    assert metrics["accuracy"] == 0.5 and metrics["margin"] == 0 and metrics["gradient_weight"] == 0.5 and metrics["logistic"] == pytest.approx(math.log(2))


def test_at_the_reference_the_gradient_is_a_quarter_beta():
    model = Model(at_reference=True)
    error_w, error_l, *_ = model.errors()
    assert_equal(model.gradient(diffusion_dpo_loss(*model.errors(), beta=BETA).mean()), BETA / 4 * model.gradient((error_w - error_l).mean()))


def test_anywhere_the_gradient_is_weighted_by_the_doubt():
    model = Model()
    error_w, error_l, *_ = model.errors()
    doubt = 1 - torch.sigmoid(official(*model.errors(), BETA)[0]).detach()
    assert doubt.std() > 0.05
    actual = model.gradient(diffusion_dpo_loss(*model.errors(), beta=BETA).mean())
    assert_equal(actual, model.gradient((BETA / 2 * doubt * (error_w - error_l)).mean()))


def test_swapping_winner_and_loser():
    w, l_, rw, rl = Model().errors()
    logit = preference_logit(w, l_, rw, rl, beta=BETA)
    assert_equal(preference_logit(l_, w, rl, rw, beta=BETA), -logit)
    assert_equal(diffusion_dpo_loss(w, l_, rw, rl, beta=BETA) - diffusion_dpo_loss(l_, w, rl, rw, beta=BETA), -logit)


def test_beta_in_other_conventions():
    model = Model()
    w, l_, rw, rl = model.errors()
    on_the_sum = -0.5 * (BETA / D) * D * ((w - rw) - (l_ - rl))
    assert_equal(preference_logit(*model.errors(), beta=BETA), on_the_sum)
    text = describe_beta(5000, 16384)
    for number in ("2500 without", "0.3052 on the sum", "0.1526 as T omega beta", "beta 2500 has this logit scale", "10000 this gradient", "0.0008"):
        assert number in text


def test_the_kto_betas_that_describe_beta_names():
    model, ones = Model(at_reference=True), torch.ones(PAIRS, dtype=torch.bool)
    w, l_, rw, rl = model.errors()

    def kto(beta):
        return (kto_loss(w, rw, ones, 0.0, beta=beta) + kto_loss(l_, rl, ~ones, 0.0, beta=beta)).mean() / 2

    assert_equal(model.gradient(kto(2 * BETA)), model.gradient(diffusion_dpo_loss(w, l_, rw, rl, beta=BETA).mean()))
    w, l_, rw, rl = Model().errors()
    pair = (BETA / 2 * ((rw - w) - (rl - l_))).sigmoid()
    assert_equal(pair, preference_logit(w, l_, rw, rl, beta=BETA).sigmoid())


def test_equal_images_teach_nothing():
    model = Model()
    w, _, rw, _ = model.errors()
    loss = diffusion_dpo_loss(w, w, rw, rw, beta=BETA)
    assert (loss == math.log(2)).all()
    assert model.gradient(loss.sum()).abs().max() == 0


def test_the_mean_is_taken_after_the_log_sigmoid():
    inside, loss, _ = official(*Model().errors(), BETA)
    assert_equal(diffusion_dpo_loss(*Model().errors(), beta=BETA).mean(), loss)
    assert abs(loss + F.logsigmoid(inside.mean())) > 0.01


def test_a_beta_for_each_pair():
    model, betas = Model(), torch.rand(PAIRS).double()
    one_by_one = [diffusion_dpo_loss(*[e[i : i + 1] for e in model.errors()], beta=float(betas[i])) for i in range(PAIRS)]
    assert_equal(diffusion_dpo_loss(*model.errors(), beta=betas), torch.cat(one_by_one))


def test_fine_tuning_on_winners_is_added():
    model = Model()
    plain = diffusion_dpo_loss(*model.errors(), beta=BETA)
    assert_equal(diffusion_dpo_loss(*model.errors(), beta=BETA, sft_weight=0.7) - plain, 0.7 * model.errors()[0])
    tie = diffusion_dpo_loss(*model.errors(), beta=BETA, label=0.5, sft_weight=0.7) - diffusion_dpo_loss(*model.errors(), beta=BETA, label=0.5)
    assert_equal(tie, 0.35 * (model.errors()[0] + model.errors()[1]))


# --- invariances, precision, two passes ----------------------------------------------------------------------------------


def test_the_coefficients_of_dpo():
    model = Model()
    w, l_, rw, rl = model.errors()
    doubt = 1 - torch.sigmoid(preference_logit(w, l_, rw, rl, beta=BETA)).detach()
    with torch.no_grad():
        _, (of_w, of_l) = error_coefficients(lambda a, b: diffusion_dpo_loss(a, b, rw, rl, beta=BETA), w, l_)
    assert_equal(of_w, BETA / 2 * doubt / PAIRS)
    assert_equal(of_l, -of_w)


# --- parametrisations ----------------------------------------------------------------------------------------------------


def test_one_network_in_three_parametrisations_has_one_loss():
    losses, reference = {}, random(5, D, seed=3)
    for kind in ("epsilon", "v_prediction", "sample"):
        forward = PROCESSES[kind]
        x0, noise, eps, x_t = noised(forward)
        clean = [PROCESSES["epsilon"].to_x0(e, x_t, TIMES.double()) for e in (eps, reference)]
        outputs = [forward.target(c, e, TIMES) for c, e in zip(clean, (eps, reference))]
        w, r = (matching_error(o, forward.target(x0, noise, TIMES)) * forward.error_weight(TIMES.double(), "eps") for o in outputs)
        losses[kind] = diffusion_dpo_loss(w, w.flip(0), r, r.flip(0), beta=BETA)
    for kind in ("v_prediction", "sample"):
        torch.testing.assert_close(losses[kind], losses["epsilon"], rtol=1e-8, atol=1e-10)
    assert losses["epsilon"].std() > 1e-3


# --- toys whose optimum is known: N(mu, S) in one dimension, reward c x, labels of Bradley and Terry --------------------------


MU, S, C, TOY_BETA = 0.4, 0.7, 0.8, 2.0


def judged_normals(number=400, seed=0):
    x = MU + math.sqrt(S) * random(2, number, seed=seed)
    return x[0], x[1], torch.sigmoid(C * (x[0] - x[1]))


def minimiser(loss):
    """Newton's method on a convex loss of one number."""
    b = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for _ in range(30):
        first = torch.autograd.grad(loss(b), b, create_graph=True)[0]
        second = torch.autograd.grad(first, b)[0]
        b = (b - first / second).detach().requires_grad_()
    return b.item()


def shifted_model_loss(alpha, sigma, flow, beta, label=None, number=400):
    """DPO of the exact denoiser of N(MU, S) plus a shift b, on pairs that share their noise."""
    first, second, p = judged_normals(number)
    label = p if label is None else label(p)
    noise, variance = random(number, seed=5), alpha**2 * S + sigma**2
    of_ref = []
    for x0 in (first, second):
        x_t = alpha * x0 + sigma * noise
        clean, eps = MU + alpha * S / variance * (x_t - alpha * MU), sigma / variance * (x_t - alpha * MU)
        of_ref.append((eps - clean, noise - x0) if flow else (eps, noise))

    def loss(b):
        errors = [(output + b - target).square() for output, target in of_ref]
        ref_errors = [(output - target).square() for output, target in of_ref]
        return diffusion_dpo_loss(*errors, *ref_errors, beta=beta, label=label).mean()

    return loss


@pytest.mark.parametrize("alpha", [0.99, 0.8, 0.3])
def test_constant_beta_dpo_of_a_noise_model_has_the_logistic_optimum(alpha):
    sigma = math.sqrt(1 - alpha**2)
    variance = alpha**2 * S + sigma**2
    fitted = minimiser(shifted_model_loss(alpha, sigma, False, TOY_BETA))
    assert fitted == pytest.approx(-C * variance / (TOY_BETA * sigma * alpha), rel=1e-10)
    tilted = -sigma * alpha * C * S / (TOY_BETA * variance)
    assert abs(fitted) > 1.3 * abs(tilted), "the optimum is not p_ref exp(r / beta)"
    corrected = TOY_BETA * variance**2 / (sigma**2 * alpha**2 * S)
    assert minimiser(shifted_model_loss(alpha, sigma, False, corrected)) == pytest.approx(tilted, rel=1e-10)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_constant_beta_dpo_of_a_flow_has_the_logistic_optimum(t):
    variance = (1 - t) ** 2 * S + t**2
    assert minimiser(shifted_model_loss(1 - t, t, True, TOY_BETA)) == pytest.approx(-C * variance / (TOY_BETA * t), rel=1e-10)
    corrected = TOY_BETA * variance**2 / (S * t**2)
    assert minimiser(shifted_model_loss(1 - t, t, True, corrected)) == pytest.approx(-C * S * t / (TOY_BETA * variance), rel=1e-10)
    bound = minimiser(shifted_model_loss(1 - t, t, True, TOY_BETA * (1 - t) ** 2))
    assert bound == pytest.approx(-C * variance / (TOY_BETA * t * (1 - t) ** 2), rel=1e-10)


def test_the_optimum_is_also_that_of_drawn_labels():
    # Each pair as it was judged: the label says who won, so it is 0 or 1.
    def drawn(p):
        return torch.bernoulli(p, generator=torch.Generator().manual_seed(3))

    t, number = 0.5, 20_000
    variance = (1 - t) ** 2 * S + t**2
    expected = -C * variance / (TOY_BETA * t)
    assert minimiser(shifted_model_loss(1 - t, t, True, TOY_BETA, drawn, number)) == pytest.approx(expected, rel=0.05)


def test_dpo_on_exact_log_probs_moves_the_mean_by_the_tilt():
    first, second, p = judged_normals()

    def loss(b):
        log_prob = [-((x - MU - b) ** 2) / (2 * S) for x in (first, second)]
        ref = [-((x - MU) ** 2) / (2 * S) for x in (first, second)]
        z = step_logit(*log_prob, *ref, per_dim=1, beta=TOY_BETA, clip="none")
        return pair_loss(z, label=p).mean()

    assert minimiser(loss) == pytest.approx(C * S / TOY_BETA, rel=1e-10)
