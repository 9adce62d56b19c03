"""Diffusion-KTO, learning from likes: identities and closed forms."""

import math

import pytest
import torch
from liked_images import BETA, B, Model
from linear_models import assert_equal, tensor
from torch.nn import functional as F

from diffusers_align.algorithms.diffusion_dpo import diffusion_dpo_loss
from diffusers_align.algorithms.diffusion_kto import REFERENCE_POINTS, UTILITY_LOSSES, ReferencePoint, describe_balance, kto_loss, kto_metrics
from diffusers_align.rl.matching import error_coefficients


def official(error, ref_error, y, utility, lambda_d=1.0, lambda_u=1.0):
    """Diffusion-KTO's lines, with the mean of the batch as its reference point."""
    g = ref_error - error
    kl = g.mean().clamp(min=0).detach()
    x = (2 * y - 1) * BETA * (g - kl)
    h = {"kahneman_tversky": F.sigmoid(x), "loss_averse": F.logsigmoid(x), "risk_seeking": -F.logsigmoid(-x)}[utility]
    return (lambda_d * y + lambda_u * (1 - y)) * (1 - h)


# --- Diffusion-KTO ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("utility", ["kahneman_tversky", "loss_averse", "risk_seeking"])
def test_the_official_formula(utility):
    model, y = Model(), Model().desirable
    error, ref_error = model.errors()
    point = ReferencePoint()(ref_error - error)
    actual = kto_loss(error, ref_error, y, point, beta=BETA, utility=utility, lambda_d=1.3, lambda_u=0.6)
    expected = official(error, ref_error, y.double(), utility, 1.3, 0.6)
    assert_equal(actual, expected)
    assert_equal(model.gradient(actual.mean()), model.gradient(expected.mean()))


@pytest.mark.parametrize(
    "utility, value", [("kahneman_tversky", 0.5), ("loss_averse", 1 + math.log(2)), ("risk_seeking", 1 - math.log(2)), ("logistic", math.log(2))]
)
def test_at_the_reference(utility, value):
    model = Model(at_reference=True)
    error, ref_error = model.errors()
    point = ReferencePoint()(ref_error - error)
    loss = kto_loss(error, ref_error, model.desirable, point, beta=BETA, utility=utility, lambda_d=2.0)
    weight = torch.where(model.desirable, 2.0, 1.0).double()
    assert point == 0
    assert_equal(loss, weight * value)
    slope = BETA / 4 if utility == "kahneman_tversky" else BETA / 2
    sign = torch.where(model.desirable, 1.0, -1.0)
    assert_equal(model.gradient(loss.mean()), model.gradient((slope * weight * sign * error).mean()))


def test_flipped_labels():
    error, ref_error = Model().errors()
    y, point = Model().desirable, 0.1
    loss = kto_loss(error, ref_error, y, point, beta=BETA)
    assert loss.std() > 0.01
    assert_equal(loss + kto_loss(error, ref_error, ~y, point, beta=BETA), torch.ones(B))


def test_a_gain_of_all_images_alike_changes_nothing():
    error, ref_error = Model().errors()

    def loss(gain):
        return kto_loss(ref_error - gain, ref_error, Model().desirable, ReferencePoint()(gain), beta=BETA)

    gain = (ref_error - error).detach()
    gain = gain - gain.mean() + 0.2
    assert_equal(loss(gain + 0.7), loss(gain))
    assert (loss(gain - 0.5) - loss(gain)).abs().max() > 0.01, "the mean is then below 0 and clamped"


def test_a_pair_as_a_like_and_a_dislike_has_dpos_gradient():
    model = Model(at_reference=True)
    error, ref_error = model.errors()
    winners = torch.arange(B) < B // 2
    kto = model.gradient(kto_loss(error, ref_error, winners, 0.0, beta=BETA).mean())
    dpo = diffusion_dpo_loss(error[: B // 2], error[B // 2 :], ref_error[: B // 2], ref_error[B // 2 :], beta=BETA / 2)
    assert_equal(kto, model.gradient(dpo.mean()))
    assert_equal(kto, BETA / 8 * model.gradient((error[: B // 2] - error[B // 2 :]).mean()))


@pytest.mark.parametrize("utility", UTILITY_LOSSES)
def test_soft_labels_and_extreme_gains(utility):
    error, ref_error = (e.detach() for e in Model().errors())
    y, certain = torch.rand(B, generator=torch.Generator().manual_seed(0)).double(), torch.ones(B)
    soft = kto_loss(error, ref_error, y, 0.1, beta=BETA, utility=utility)
    likes, dislikes = (kto_loss(error, ref_error, label, 0.1, beta=BETA, utility=utility) for label in (certain, 0 * certain))
    assert_equal(soft, y * likes + (1 - y) * dislikes)
    assert (likes[error < ref_error - 0.1] < likes[error > ref_error - 0.1].min()).all(), "what is desirable is to gain"
    far = torch.full((2,), 1e5, dtype=torch.float64, requires_grad=True)
    loss = kto_loss(far, torch.zeros(2), torch.tensor([True, False]), 0.0, beta=5000.0, utility=utility)
    assert loss.isfinite().all() and torch.autograd.grad(loss.sum(), far)[0].isfinite().all()


def test_logistic_is_the_classifiers_loss():
    error, ref_error = Model().errors()
    z, y = BETA * (ref_error - error - 0.1), torch.rand(B).double()
    expected = F.binary_cross_entropy_with_logits(z, y, reduction="none")
    assert_equal(kto_loss(error, ref_error, y, 0.1, beta=BETA, utility="logistic"), expected)


@pytest.mark.parametrize("utility", UTILITY_LOSSES)
def test_gradcheck_and_two_passes(utility):
    model = Model()
    error, ref_error = model.errors()
    point = ReferencePoint()(ref_error - error)
    options = {"beta": BETA, "utility": utility, "lambda_d": 1.2}
    assert torch.autograd.gradcheck(lambda e: kto_loss(e, ref_error.detach(), model.desirable, point, **options), [error.detach().requires_grad_()])
    one_pass = model.gradient(kto_loss(error, ref_error, model.desirable, point, **options).mean())

    def whole(e):
        return kto_loss(e, ref_error, model.desirable, ReferencePoint()(ref_error - e), **options)

    _, (coefficient,) = error_coefficients(whole, error)
    pieces = [model.gradient((coefficient[rows] * model.errors()[0][rows]).sum()) for rows in (slice(0, 1), slice(1, B))]
    assert_equal(sum(pieces), one_pass)


def test_what_kto_refuses():
    error = torch.ones(2)
    with pytest.raises(ValueError, match="kahneman_tversky, loss_averse, risk_seeking, logistic"):
        kto_loss(error, error, error, 0.0, beta=1.0, utility="kt")
    with pytest.raises(ValueError, match="a probability"):
        kto_loss(error, error, torch.tensor([1, -1]), 0.0, beta=1.0)


# --- its reference points ------------------------------------------------------------------------------------------------


GAIN, LIKED = tensor(0.5, 0.1, -0.3, 0.4), torch.tensor([True, False, False, False])


@pytest.mark.parametrize(
    "kind, expected",
    [("batch_mean", 0.175), ("class_mean", (0.5 + 0.2 / 3) / 2), ("mismatched", 0.25), ("ema", 0.01 * 0.175), ("zero", 0.0)],
)
def test_reference_points(kind, expected):
    assert kind in REFERENCE_POINTS
    gain = GAIN.clone().requires_grad_()
    point = ReferencePoint(kind)(gain, LIKED, mismatched_gain=tensor(0.1, 0.2, 0.3, 0.4))
    assert point.shape == () and not point.requires_grad and point.dtype == torch.float64
    assert point.item() == pytest.approx(expected)


def test_a_class_that_is_missing():
    assert ReferencePoint("class_mean")(GAIN, torch.ones(4)).item() == pytest.approx(0.175)


@pytest.mark.parametrize("kind", ["batch_mean", "class_mean", "mismatched", "ema"])
def test_the_clamp(kind):
    arguments = {"desirable": LIKED, "mismatched_gain": -GAIN}
    assert ReferencePoint(kind)(-GAIN, **arguments) == 0
    assert ReferencePoint(kind, clamp=False)(-GAIN, **arguments) < 0


@pytest.mark.parametrize("kind", REFERENCE_POINTS)
def test_processes_share_one_point(kind):
    """Two processes of unequal batches, each given the other's sums."""
    parts, liked = (GAIN[:3], GAIN[3:]), (LIKED[:3], LIKED[3:])
    whole = ReferencePoint(kind)(GAIN, LIKED, mismatched_gain=GAIN)
    sums = []
    for gain, labels in zip(parts, liked):
        try:
            ReferencePoint(kind)(gain, labels, mismatched_gain=gain, reduce=lambda total: sums.append(total) or total)
        except ValueError:
            assert len(gain) == 1
    for i, (gain, labels) in enumerate(zip(parts, liked)):
        shared = ReferencePoint(kind)(gain, labels, mismatched_gain=gain, reduce=lambda total, other=1 - i: total + sums[other])
        assert shared.item() == pytest.approx(whole.item(), abs=1e-12)


def test_the_running_point():
    assert ReferencePoint("ema", decay=0.0)(GAIN).item() == pytest.approx(ReferencePoint()(GAIN).item())
    point, values = ReferencePoint("ema", decay=0.9), []
    for gain in (1.0, 2.0, -8.0):
        values.append(point(tensor(gain)).item())
    assert values == pytest.approx([0.1, 0.29, 0.0])
    resumed = ReferencePoint("ema", decay=0.9)
    resumed.load_state_dict(point.state_dict())
    assert resumed(tensor(9.0)) == point(tensor(9.0)) and resumed.running == pytest.approx(0.9 * (0.261 - 0.8) + 0.9)


@pytest.mark.parametrize("kind", ["batch_mean", "class_mean", "mismatched"])
def test_one_image_is_no_reference(kind):
    with pytest.raises(ValueError, match="whatever it has learned"):
        ReferencePoint(kind)(tensor(0.3), torch.ones(1), mismatched_gain=tensor(0.3))
    pair = ReferencePoint(kind)(tensor(0.3), torch.ones(1), mismatched_gain=tensor(0.3), reduce=lambda total: 2 * total)
    assert pair.item() == pytest.approx(0.3)


def test_what_a_reference_point_needs():
    with pytest.raises(ValueError, match="batch_mean, class_mean, mismatched, ema, zero"):
        ReferencePoint("median")
    with pytest.raises(ValueError, match="needs `desirable`"):
        ReferencePoint("class_mean")(GAIN)
    with pytest.raises(ValueError, match="needs `mismatched_gain`"):
        ReferencePoint("mismatched")(GAIN)


def test_kto_metrics():
    error, ref_error = tensor(1.0, 2, 3, 4), tensor(1.5, 1.9, 3.1, 4)
    metrics = kto_metrics(error, ref_error, LIKED, 0.0, beta=2.0)
    slope = [4 * p * (1 - p) for p in torch.sigmoid(2 * (ref_error - error)).tolist()]
    expected = {"reference_point": 0, "accuracy": 2.5 / 4, "gain_desirable": 0.5, "gain_undesirable": 0, "gradient_weight": sum(slope) / 4}
    assert metrics == pytest.approx(expected, abs=1e-12)
    assert "gain_undesirable" not in kto_metrics(error, ref_error, torch.ones(4), 0.0, beta=2.0)


def test_describe_balance():
    assert describe_balance(100, 100) == "100 desirable and 100 undesirable images, weighing 1 to 1"
    assert "lambda_d 2.91 gives 1" in describe_balance(237_530, 690_538)
    assert "4/3" not in describe_balance(237_530, 690_538, lambda_d=3.5)
    assert describe_balance(77, 19) == "77 desirable and 19 undesirable images, weighing 4.05 to 1, as in Diffusion-KTO (gamma 0.8)"
    assert "one class alone" in describe_balance(10, 0)
    assert describe_balance(10, 10, lambda_u=0.0).endswith("of which the undesirable weigh nothing")
