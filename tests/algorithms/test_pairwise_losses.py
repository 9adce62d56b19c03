"""Losses of pairs: identities in float64 with a linear model, where every number can be had a second way."""

import inspect
import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch.nn import functional as F

from diffusers_align import sde_twin
from diffusers_align.algorithms.d3po import CLIPS, d3po_loss, d3po_metrics, sampled_steps, step_logit
from diffusers_align.algorithms.diffusion_dpo import describe_beta, diffusion_dpo_loss, preference_logit, preference_metrics
from diffusers_align.algorithms.diffusion_kto import kto_loss
from diffusers_align.algorithms.diffusion_sdpo import safeguard_scale, scale_gradient
from diffusers_align.algorithms.dspo import dspo_loss
from diffusers_align.algorithms.inpo import inversion_times, invert, inverted_noise
from diffusers_align.algorithms.linear_dpo import linear_dpo_loss, linear_weight
from diffusers_align.algorithms.mapo import likelihood_score, mapo_loss, mapo_margin
from diffusers_align.algorithms.spo import resample, spo_loss, step_pairs
from diffusers_align.forward_process import WEIGHTINGS, ForwardProcess
from diffusers_align.rl.matching import error_coefficients, matching_error
from diffusers_align.rl.pair_losses import PAIR_LOSSES, pair_loss, ranked_pairs

torch.set_num_threads(1)
PAIRS, D = 6, 4
BETA = 5.0
NAN = math.nan


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_equal(actual, expected, atol=1e-12):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=0, atol=atol)


class Model:
    """A linear model of the target and its reference, on noised winners and losers."""

    def __init__(self, at_reference=False, pairs=PAIRS):
        self.x_w, self.x_l, self.y_w, self.y_l = random(4, pairs, D)
        self.reference = random(D, D, seed=1) / 2
        self.weight = (self.reference + (0 if at_reference else 0.3) * random(D, D, seed=2)).requires_grad_()

    def errors(self, rows=slice(None)):
        """(error_w, error_l, ref_error_w, ref_error_l)."""
        sides = ((self.x_w[rows], self.y_w[rows]), (self.x_l[rows], self.y_l[rows]))
        return [matching_error(x @ weight, y) for weight in (self.weight, self.reference) for x, y in sides]

    def ref_distance(self):
        return matching_error(self.x_w @ self.weight, self.x_w @ self.reference)

    def gradient(self, loss):
        return torch.autograd.grad(loss, self.weight, retain_graph=True)[0]


def official(error_w, error_l, ref_error_w, ref_error_l, beta):
    """Salesforce's lines: inside term, loss, implicit accuracy."""
    model_diff, ref_diff = error_w - error_l, ref_error_w - ref_error_l
    inside = -0.5 * beta * (model_diff - ref_diff)
    return inside, -1 * F.logsigmoid(inside).mean(), (inside > 0).sum() / inside.size(0)


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
    assert metrics["accuracy"] == 0.5 and metrics["margin"] == 0 and metrics["gradient_weight"] == 0.5


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


# --- kinds and labels ------------------------------------------------------------------------------------------------------


def test_hinge_and_ipo_by_hand():
    zero = torch.zeros(1).double()
    assert pair_loss(zero, kind="hinge") == 1
    assert_equal(pair_loss(tensor(-1, 0.25, 1, 3), kind="hinge"), [2, 0.75, 0, 0])
    for tau in (0.5, 0.1):
        assert_equal(pair_loss(zero, kind="ipo", ipo_tau=tau), [1 / (4 * tau**2)])
        assert_equal(pair_loss(tensor(1 / (2 * tau)), kind="ipo", ipo_tau=tau), [0.0])
        assert_equal(pair_loss(tensor(1 / (2 * tau) - 2), kind="ipo", ipo_tau=tau), [4.0])


@pytest.mark.parametrize("alpha", [0.01, 0.3])
def test_dmpo_is_a_reverse_kl(alpha):
    z = tensor(-4, -1, 0, 2, 5).requires_grad_()
    p, q = torch.sigmoid(z), 1 - alpha
    loss = pair_loss(z, kind="dmpo", dmpo_alpha=alpha)
    assert_equal(loss, (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).detach(), atol=1e-10)
    assert_equal(torch.autograd.grad(loss.sum(), z)[0], (p * (1 - p) * (z - math.log(q / (1 - q)))).detach(), atol=1e-10)
    optimum = torch.tensor([math.log(q / (1 - q))], dtype=torch.float64, requires_grad=True)
    at_optimum = pair_loss(optimum, kind="dmpo", dmpo_alpha=alpha)
    assert at_optimum.abs() < 1e-12 and torch.autograd.grad(at_optimum, optimum)[0].abs() < 1e-12


@pytest.mark.parametrize("kind", PAIR_LOSSES)
def test_every_kind_is_finite_and_asks_for_a_larger_logit_at_zero(kind):
    z = torch.tensor([-800.0, 0.0, 800.0], dtype=torch.float64, requires_grad=True)
    loss = pair_loss(z, kind=kind)
    gradient = torch.autograd.grad(loss.sum(), z)[0]
    assert loss.isfinite().all() and gradient.isfinite().all() and gradient[1] < 0


@pytest.mark.parametrize("kind", PAIR_LOSSES)
def test_soft_labels(kind):
    z, p = random(7), torch.rand(7, generator=torch.Generator().manual_seed(1)).double()
    assert_equal(pair_loss(z, kind=kind, label=p), p * pair_loss(z, kind=kind) + (1 - p) * pair_loss(-z, kind=kind))
    assert_equal(pair_loss(z, kind=kind, label=p), pair_loss(-z, kind=kind, label=1 - p))
    assert_equal(pair_loss(z, kind=kind, label=1.0), pair_loss(z, kind=kind))
    smoothed = pair_loss(z, kind=kind, label_smoothing=0.1)
    assert_equal(smoothed, pair_loss(z, kind=kind, label=0.9))
    assert_equal(pair_loss(z, kind=kind, label=p, label_smoothing=0.1), pair_loss(z, kind=kind, label=0.9 * p + 0.1 * (1 - p)))


@pytest.mark.parametrize("p", [0.5, 0.8])
def test_the_optimum_of_a_soft_label_is_its_logit(p):
    z = tensor(math.log(p / (1 - p))).requires_grad_()
    loss = pair_loss(z, label=p)
    assert torch.autograd.grad(loss.sum(), z)[0].abs() < 1e-15
    assert (pair_loss(z.detach() + tensor(-0.1, 0.1), label=p) > loss).all()


def test_kinds_and_labels_that_do_not_exist():
    with pytest.raises(ValueError, match="sigmoid, hinge, ipo, dmpo"):
        pair_loss(tensor(0), kind="huber")
    with pytest.raises(ValueError, match="0.5 a tie"):
        pair_loss(tensor(0, 1), label=tensor(0.5, -1))


def test_pairs_from_scores():
    scores, groups = tensor(3, 1, NAN, 2, 5, 5, 4, 7), torch.tensor([0, 0, 0, 0, 1, 1, 1, 2])
    winners, losers = ranked_pairs(scores, groups)
    assert set(zip(winners.tolist(), losers.tolist())) == {(0, 1), (0, 3), (3, 1), (4, 6), (5, 6)} and len(winners) == 5
    winners, losers = ranked_pairs(scores, groups, kind="extremes")
    assert list(zip(winners.tolist(), losers.tolist())) == [(0, 1), (4, 6)]
    assert set(zip(*(side.tolist() for side in ranked_pairs(scores, groups, min_gap=1.0)))) == {(0, 1)}
    with pytest.raises(ValueError, match="extremes"):
        ranked_pairs(scores, groups, kind="best")


# --- invariances, precision, two passes ----------------------------------------------------------------------------------


LOSSES = {
    **{kind: lambda w, l_, rw, rl, k, kind=kind: diffusion_dpo_loss(w, l_, rw, rl, beta=BETA, kind=kind) for kind in PAIR_LOSSES},
    "soft": lambda w, l_, rw, rl, k: diffusion_dpo_loss(w, l_, rw, rl, beta=BETA, label=0.7, sft_weight=0.3),
    "mapo": lambda w, l_, rw, rl, k: mapo_loss(w, l_, num_timesteps=10),
    "linear": lambda w, l_, rw, rl, k: linear_dpo_loss(w, l_, rw, rl, beta=0.5),
    "dspo": lambda w, l_, rw, rl, k: dspo_loss(w, l_, rw, rl, k, beta=BETA, dspo_beta=0.6),
    "dspo distance": lambda w, l_, rw, rl, k: dspo_loss(w, l_, rw, rl, k, beta=BETA, objective="distance"),
}


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


def test_the_coefficients_of_dpo():
    model = Model()
    w, l_, rw, rl = model.errors()
    doubt = 1 - torch.sigmoid(preference_logit(w, l_, rw, rl, beta=BETA)).detach()
    with torch.no_grad():
        _, (of_w, of_l) = error_coefficients(lambda a, b: diffusion_dpo_loss(a, b, rw, rl, beta=BETA), w, l_)
    assert_equal(of_w, BETA / 2 * doubt / PAIRS)
    assert_equal(of_l, -of_w)


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


# --- parametrisations ----------------------------------------------------------------------------------------------------


TABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PROCESSES = {
    "flow": ForwardProcess(sde_twin(FlowMatchEulerDiscreteScheduler())),
    "inverted flow": ForwardProcess(sde_twin(FlowMatchEulerDiscreteScheduler(invert_sigmas=True))),
    **{kind: ForwardProcess(sde_twin(DDIMScheduler(prediction_type=kind, **TABLE))) for kind in ("epsilon", "v_prediction", "sample")},
}
TIMES = torch.tensor([999.0, 700.0, 300.0, 40.0, 1.0])


def noised(forward):
    x0, noise, output = random(3, 5, D)
    return x0, noise, output, forward.add_noise(x0, noise, TIMES)


@pytest.mark.parametrize("kind", PROCESSES)
def test_weights_convert_errors_exactly(kind):
    forward = PROCESSES[kind]
    x0, noise, output, x_t = noised(forward)
    native, t = matching_error(output, forward.target(x0, noise, TIMES)), TIMES.double()
    for weighting, implied in (("eps", (forward.to_noise(output, x_t, t), noise)), ("x0", (forward.to_x0(output, x_t, t), x0)), ("native", None)):
        expected = matching_error(*implied) if implied else native
        torch.testing.assert_close(forward.error_weight(t, weighting) * native, expected, rtol=1e-8, atol=0)
    with pytest.raises(ValueError, match=", ".join(WEIGHTINGS)):
        forward.error_weight(t, "snr")


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


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_elbo_of_a_table_is_the_kl_of_the_posterior(kind):
    forward, t = PROCESSES[kind], TIMES.double()
    cumprod = forward.scheduler.alphas_cumprod.double()
    now, before = cumprod[t.long()], cumprod[t.long() - 1]
    beta = 1 - now / before
    mean_weight, variance = before.sqrt() * beta / (1 - now), (1 - before) / (1 - now) * beta
    expected = 1000 * mean_weight.square() / (2 * variance)  # of the squared x0 error: KL of Gaussians of one variance
    torch.testing.assert_close(forward.error_weight(t, "elbo") / forward.error_weight(t, "x0"), expected, rtol=1e-6, atol=0)
    assert forward.error_weight(torch.zeros(1), "elbo") == 0


@pytest.mark.parametrize("kind", ["flow", "inverted flow"])
def test_elbo_of_a_flow_is_the_derivative_of_the_snr(kind):
    forward, t, h = PROCESSES[kind], TIMES[1:4].double(), 1e-3
    slope = (forward.snr(t + h) - forward.snr(t - h)).abs() / (2 * h) * 1000
    torch.testing.assert_close(forward.error_weight(t, "elbo") / forward.error_weight(t, "x0"), slope / 2, rtol=1e-6, atol=0)


# --- MaPO ------------------------------------------------------------------------------------------------------------------


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


# --- Diffusion-SDPO --------------------------------------------------------------------------------------------------------


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


# --- Linear-DPO, DSPO ------------------------------------------------------------------------------------------------------


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


def test_dspo_is_the_official_vector_form():
    model = Model()
    inside, *_ = official(*model.errors(), BETA)
    output, reference = model.x_w @ model.weight, model.x_w @ model.reference
    c = 0.6 * (1 - torch.sigmoid(inside))[:, None]
    expected = ((output - model.y_w) - c * (output - reference)).square().mean(1)
    actual = dspo_loss(*model.errors(), model.ref_distance(), beta=BETA, dspo_beta=0.6)
    assert_equal(actual, expected)
    assert_equal(model.gradient(actual.mean()), model.gradient(expected.mean()))


def test_dspo_at_the_reference_is_fine_tuning_on_winners():
    model = Model(at_reference=True)
    loss, winner = dspo_loss(*model.errors(), model.ref_distance(), beta=BETA, dspo_beta=0.6), model.errors()[0]
    assert_equal(loss, winner)
    assert_equal(model.gradient(loss.mean()), (1 - 0.6 / 2) * model.gradient(winner.mean()))


def test_dspo_of_the_official_sdxl_code():
    model = Model()
    doubt, distance = 1 - torch.sigmoid(official(*model.errors(), BETA)[0]), tensor(0, 0.05, 0.1, 0.2, 1, 2)
    expected = [d**2 * (k if k >= 0.1 else 1) for d, k in zip(doubt.tolist(), distance.tolist())]
    assert_equal(dspo_loss(*model.errors(), distance, beta=BETA, objective="distance"), expected)
    with pytest.raises(ValueError, match='"score" or "distance"'):
        dspo_loss(*model.errors(), distance, beta=BETA, objective="sdxl")


# --- D3PO ------------------------------------------------------------------------------------------------------------------


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


def test_spo_is_d3po_with_another_beta():
    log_probs = random(4, 9)
    for clip in CLIPS:
        assert_equal(spo_loss(*log_probs, per_dim=3, clip=clip), d3po_loss(*log_probs, per_dim=3, beta=10.0, clip=clip))
    assert inspect.signature(spo_loss).parameters["clip"].default == "one_sided"
    with pytest.raises(ValueError, match="one_sided, official, none"):
        spo_loss(*log_probs, per_dim=3, clip="ppo")


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


# --- SPO -------------------------------------------------------------------------------------------------------------------


def test_step_pairs_are_best_and_worst_by_the_softmax_difference():
    scores = torch.cat([3 * random(50, 4), tensor(1, 1, 1, 1)[None], tensor(NAN, 2, 0, 1)[None], tensor(NAN, NAN, NAN, 5)[None], tensor(*[NAN] * 4)[None]])
    pairs = step_pairs(scores, threshold=0.3)
    for i in range(50):
        ranked = scores[i].sort(descending=True)
        two = ranked.values[[0, -1]].softmax(0)
        assert (pairs.winner[i], pairs.loser[i]) == (ranked.indices[0], ranked.indices[-1])
        assert pairs.keep[i] == (two[0] - two[1] > 0.3)
    assert 0 < pairs.keep[:50].sum() < 50 or pairs.keep[:50].all()
    assert not pairs.keep[50] and pairs.gap[50] == 0
    assert (pairs.winner[51], pairs.loser[51], pairs.keep[51]) == (1, 2, True)
    assert not pairs.keep[52:].any() and (pairs.gap[52:] == 0).all()
    with pytest.raises(ValueError, match="k >= 2"):
        step_pairs(scores[:, :1])


@pytest.mark.parametrize("threshold", [0.3, 0.4])
def test_the_threshold_in_scores(threshold):
    gap = 2 * math.atanh(threshold)
    assert step_pairs(tensor(0, gap + 1e-9)[None], threshold=threshold).keep
    assert not step_pairs(tensor(0, gap - 1e-9)[None], threshold=threshold).keep


def test_resampling_is_uniform_and_keyed_by_sample():
    def generators(seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    drawn = resample(1000, 4, generators(range(1000)))
    counts = torch.bincount(drawn, minlength=4)
    assert counts.sum() == 1000 and counts.min() > 190 and counts.max() < 310
    assert (resample(3, 4, generators([7, 500, 2])) == drawn[[7, 500, 2]]).all()
    with pytest.raises(ValueError, match="a generator each"):
        resample(2, 4, generators([0]))


# --- InPO ------------------------------------------------------------------------------------------------------------------


def levels_of(forward):
    return lambda t: (forward.alpha(t), forward.sigma(t))


@pytest.mark.parametrize("kind", PROCESSES)
def test_inverted_noise_is_that_of_the_forward_process(kind):
    forward = PROCESSES[kind]
    x0, noise, _, x_t = noised(forward)
    assert_equal(inverted_noise(x_t, x0, *levels_of(forward)(TIMES.double())), noise, atol=1e-8)


def test_inversion_times():
    t = torch.tensor([900, 35, 3])
    times = inversion_times(t, num_steps=10)
    assert times.shape == (11, 3) and times.dtype == torch.int64
    assert (times[0] == 0).all() and (times[-1] == t).all() and (times.diff(dim=0) >= 0).all()
    assert times[:, 0].tolist() == list(range(0, 901, 90))
    assert_equal(inversion_times(tensor(400, 1000), num_steps=2, clean=1000.0), [[1000, 1000], [700, 1000], [400, 1000]])


@pytest.mark.parametrize("kind", PROCESSES)
def test_an_inversion_starts_where_there_is_least_noise(kind):
    forward = PROCESSES[kind]
    clean = inversion_times(TIMES[1:4], num_steps=3, clean=forward.clean_timestep)[0]
    assert (clean == (1000 if kind == "inverted flow" else 0)).all()
    assert (forward.sigma(clean) < forward.sigma(TIMES[1:4])).all()


def gaussian_denoiser(forward, mean, variance):
    """The best denoiser of data N(mean, variance)."""

    def denoise(x, t):
        alpha, sigma = (level.reshape(-1, 1) for level in levels_of(forward)(t))
        clean = mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x - alpha * mean)
        return clean, (x - alpha * clean) / sigma

    return denoise


@pytest.mark.parametrize("kind", ["flow", "epsilon"])
def test_inversion_follows_the_probability_flow(kind):
    forward, x0, t = PROCESSES[kind], 0.5 + 1.5 * random(5, 3), torch.tensor([990.0, 700.0, 300.0, 100.0, 50.0])
    denoise = gaussian_denoiser(forward, 0.5, 2.25)
    times = inversion_times(t.double() if kind == "flow" else t.long(), num_steps=400, clean=1.0)
    start, end = (torch.stack(levels_of(forward)(time.double())) for time in (times[0], times[-1]))
    x_t = invert(start[0, :, None] * x0, times, denoise, lambda time: levels_of(forward)(time.double()), eta=0)
    spread = [(level[0] ** 2 * 2.25 + level[1] ** 2).sqrt()[:, None] for level in (start, end)]
    centre = [level[0][:, None] * 0.5 for level in (start, end)]
    expected = centre[1] + spread[1] / spread[0] * (start[0, :, None] * x0 - centre[0])
    assert (x_t - expected).abs().max() < 0.05
    noise = inverted_noise(x_t, x0, *end)
    assert (matching_error(forward.add_noise(x0, noise, t.double()), x_t) < 1e-12).all()


def test_each_sample_is_inverted_to_its_own_time():
    forward, x0, t = PROCESSES["flow"], random(3, 4), tensor(900, 500, 20)
    denoise, levels = gaussian_denoiser(forward, 0.0, 1.0), levels_of(forward)
    times = inversion_times(t, clean=1.0)
    together = invert(x0, times, denoise, levels, eta=0)
    one_by_one = [invert(x0[i : i + 1], times[:, i : i + 1], denoise, levels, eta=0) for i in range(3)]
    assert_equal(together, torch.cat(one_by_one))
    assert not torch.cat(one_by_one).requires_grad
    noisy = [invert(x0[rows], times[:, rows], denoise, levels, generator=[torch.Generator().manual_seed(i) for i in rows]) for rows in ([0, 1, 2], [2, 0])]
    assert_equal(noisy[1], noisy[0][[2, 0]])
    assert (noisy[0] - together).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["flow", "epsilon"])
def test_the_noise_of_an_inversion_step(kind):
    forward, eta = PROCESSES[kind], 0.1
    times = torch.tensor([[300], [500]])
    x0 = torch.zeros(40_000, 1, dtype=torch.float64)

    def silent(x, t):
        return torch.zeros_like(x), torch.zeros_like(x)

    drawn = invert(x0, times, silent, lambda t: levels_of(forward)(t.double()), eta=eta, generator=torch.Generator().manual_seed(0))
    if kind == "epsilon":  # diffusers' own variance of the step back
        expected = eta * forward.scheduler._get_variance(500, 300) ** 0.5
    else:
        expected = eta * 0.3 * math.sqrt(1 - (0.5 * 0.3 / (0.7 * 0.5)) ** 2)
    assert drawn.std().item() == pytest.approx(float(expected), rel=0.02)
    still = invert(x0[:2], torch.zeros(3, 2, dtype=torch.long), silent, lambda t: (1 - t.double(), t.double()), generator=torch.Generator())
    assert still.abs().max() == 0


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
