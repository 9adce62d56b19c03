"""Reward-weighted regression: identities and closed forms."""

import math

import pytest
import torch
from liked_images import BETA, B, Model
from linear_models import NAN, assert_equal, random, tensor

from diffusers_align.algorithms.diffusion_kto import ReferencePoint, kto_loss
from diffusers_align.algorithms.reward_weighted_regression import KINDS, reward_weighted_loss, reward_weights, weight_statistics
from diffusers_align.rl.matching import matching_error

# --- Diffusion-KTO ---------------------------------------------------------------------------------------------------------


def test_classes_have_weights_of_their_own():
    model = Model()
    error, ref_error = model.errors()

    def gradient(**weights):
        return model.gradient(kto_loss(error, ref_error, model.desirable, 0.0, beta=BETA, **weights).mean())

    alone = [gradient(lambda_u=0.0), gradient(lambda_d=0.0)]
    assert_equal(gradient(lambda_d=1.3, lambda_u=0.4), 1.3 * alone[0] + 0.4 * alone[1])
    everything = kto_loss(error, ref_error, torch.ones(B, dtype=torch.bool), ReferencePoint()(ref_error - error), beta=BETA)
    assert everything.isfinite().all() and model.gradient(everything.mean()).abs().max() > 1e-3


# --- reward-weighted regression --------------------------------------------------------------------------------------------


REWARDS, GROUPS = tensor(3, 1, 2, 0.5, 9, 8), torch.tensor([0, 0, 0, 0, 1, 1])


@pytest.mark.parametrize("scope", ["global", "prompt"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "raw"])
def test_weights_have_mean_one_and_follow_their_rewards(kind, scope):
    options = {"kind": kind, "scope": scope, "temperature": 0.7, "top_k": 2, "top_q": 0.5}
    weights = reward_weights(REWARDS, GROUPS, **options)
    assert weights.dtype == torch.float64 and weights.mean().item() == pytest.approx(1)
    if scope == "prompt":
        assert [weights[GROUPS == g].mean().item() for g in (0, 1)] == pytest.approx([1, 1])
    members = GROUPS == 0
    order = REWARDS[members].argsort()
    assert (weights[members][order].diff() >= 0).all()
    shuffle = torch.tensor([4, 2, 0, 5, 3, 1])
    assert_equal(reward_weights(REWARDS[shuffle], GROUPS[shuffle], **options), weights[shuffle])
    assert_equal(reward_weights(torch.full((6,), 0.3), GROUPS, **options), torch.ones(6))
    if kind in ("softmax", "exp_clipped", "rank"):
        assert_equal(reward_weights(REWARDS + 100, GROUPS, **options), weights, atol=1e-10)


def test_weights_by_hand():
    assert_equal(reward_weights(tensor(0, math.log(3)), temperature=1.0), [0.5, 1.5])
    assert_equal(reward_weights(tensor(0, math.log(3)), temperature=2.0), [2 / (1 + 3**0.5), 2 * 3**0.5 / (1 + 3**0.5)])
    assert_equal(reward_weights(tensor(5, 1, 1, 7), kind="top_k", top_k=2), [2, 0, 0, 2])
    assert_equal(reward_weights(tensor(5, 1, 1, 7), kind="top_k", top_k=3), [4 / 3, 2 / 3, 2 / 3, 4 / 3])
    assert_equal(reward_weights(REWARDS, GROUPS, kind="top_k", scope="prompt"), [4, 0, 0, 0, 2, 0])
    assert_equal(reward_weights(REWARDS, kind="top_q", top_q=0.34), [2, 0, 0, 0, 2, 2])
    assert_equal(reward_weights(REWARDS, kind="top_q", top_q=0.33), [0, 0, 0, 0, 3, 3])
    assert_equal(reward_weights(REWARDS, kind="top_q", top_q=1.0), torch.ones(6))
    ranked = tensor(0.2, 0, 0.4, 0.6, 1.0, 0.8).sort().values
    assert_equal(reward_weights(tensor(-9, 1, 2, 3, 4, 1e6), kind="rank", temperature=0.5), 6 * (ranked / 0.5).softmax(0))
    assert_equal(reward_weights(tensor(1, 1, 2), kind="rank"), 3 * tensor(0.25, 0.25, 1).softmax(0))
    clipped = tensor(math.exp(-5), 2.0)
    assert_equal(reward_weights(tensor(0, 10), kind="exp_clipped", max_weight=2.0), 2 * clipped / clipped.sum())


def test_raw_weights_are_the_rewards():
    assert_equal(reward_weights(tensor(0, 0.2, NAN, 1), kind="raw"), [0, 0.2, 0, 1])
    with pytest.raises(ValueError, match="rescale the rewards"):
        reward_weights(tensor(0.5, 1.2), kind="raw")
    with pytest.raises(ValueError, match="all 0: nothing would be learned"):
        reward_weights(tensor(0, NAN, 0), kind="raw")


@pytest.mark.parametrize("scope", ["global", "prompt"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_could_not_be_scored_has_no_weight(kind, scope):
    holes, scored = tensor(NAN, 0.2, 0.9, NAN, 0.5, NAN), torch.tensor([1, 2, 4])
    weights = reward_weights(holes, GROUPS, kind=kind, scope=scope, top_q=0.5)
    assert (weights[[0, 3, 5]] == 0).all()
    assert_equal(weights[scored], reward_weights(holes[scored], GROUPS[scored], kind=kind, scope=scope, top_q=0.5))
    with pytest.raises(ValueError, match="could be scored"):
        reward_weights(tensor(NAN, NAN), GROUPS[:2], kind=kind, scope=scope)


def test_temperatures_limits():
    assert_equal(reward_weights(REWARDS, temperature=1e9), torch.ones(6), atol=1e-6)
    assert_equal(reward_weights(REWARDS, GROUPS, scope="prompt", temperature=1e-3), reward_weights(REWARDS, GROUPS, scope="prompt", kind="top_k"))


def test_ddpos_temperature_multiplies():
    n_softmax = len(REWARDS) * torch.softmax(0.2 * REWARDS, 0)
    assert_equal(reward_weights(REWARDS, temperature=5.0), n_softmax)


def test_statistics_of_weights():
    statistics = weight_statistics(torch.ones(10))
    assert statistics == pytest.approx({"effective_samples": 10, "samples_for_90_percent": 9, "max_weight": 1})
    statistics = weight_statistics(tensor(3, 0, 1, 0))
    assert statistics == pytest.approx({"effective_samples": 16 / 10, "samples_for_90_percent": 2, "max_weight": 3})
    assert weight_statistics(tensor(4, 0, 0, 0))["samples_for_90_percent"] == 1


def test_a_collapse_is_refused_unless_forced():
    rewards = random(1000)
    with pytest.raises(ValueError, match="Raise the temperature"):
        reward_weights(rewards, temperature=0.05)
    forced = reward_weights(rewards, temperature=0.05, force=True)
    assert weight_statistics(forced)["effective_samples"] < 10 and forced.mean().item() == pytest.approx(1)
    assert weight_statistics(reward_weights(rewards, temperature=1.0))["effective_samples"] > 10
    reward_weights(rewards, kind="exp_clipped", temperature=0.5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "best"}, "softmax, rank, top_k"),
        ({"scope": "group"}, '"global" or "prompt"'),
        ({"scope": "prompt"}, "needs `groups`"),
        ({"temperature": 0.0}, "temperature > 0"),
        ({"top_q": 1.5}, "top_q <= 1"),
        ({"top_k": 0}, "top_k >= 1"),
    ],
)
def test_what_weights_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        reward_weights(REWARDS, **options)


def test_equal_rewards_are_plain_fine_tuning():
    error = Model().errors()[0].float()
    assert torch.equal(reward_weighted_loss(error, reward_weights(torch.full((B,), 0.7))), error)


def test_the_terms_of_the_loss():
    model = Model()
    error, _ = model.errors()
    distance, weight = matching_error(model.x @ model.weight, model.x @ model.reference), reward_weights(random(B))
    loss = reward_weighted_loss(error, weight, distance, error.flip(0), kl_weight=0.3, pretrain_weight=0.7)
    assert_equal(loss, weight * error + 0.3 * distance + 0.7 * error.flip(0))
    assert_equal(reward_weighted_loss(error, weight, pretraining_error=error.mean(), pretrain_weight=0.7), weight * error + 0.7 * error.mean())
    first = model.gradient(loss[:3].sum()) + model.gradient(loss[3:].sum())
    assert_equal(first / B, model.gradient(loss.mean()))
    inputs = [x.detach().requires_grad_() for x in (error, distance)]
    assert torch.autograd.gradcheck(lambda e, k: reward_weighted_loss(e, weight, k, kl_weight=0.3), inputs)


# --- N(mu, S) in one dimension under the reward c x ------------------------------------------------------------------------


MU, S, C, TAU = 0.4, 0.7, 0.8, 1.5776


def normal(number, mean=MU):
    """Equally likely points of N(mean, S), of its exact mean and variance."""
    x = torch.special.ndtri((torch.arange(number, dtype=torch.float64) + 0.5) / number)
    return mean + math.sqrt(S) * x / x.std(correction=0)


def test_weights_tilt_a_gaussian():
    x = normal(200_000)
    weights = reward_weights(C * x, temperature=TAU)
    mean = (weights * x).mean()
    assert mean.item() == pytest.approx(MU + C * S / TAU, rel=1e-3)
    assert (weights * (x - mean).square()).mean().item() == pytest.approx(S, rel=3e-3)
    assert weight_statistics(weights)["effective_samples"] / len(x) == pytest.approx(math.exp(-(C**2) * S / TAU**2), rel=2e-3)
    # The regression's optimum for a constant output is the weighted mean.
    output = mean.clone().requires_grad_()
    loss = reward_weighted_loss(matching_error(output.expand(len(x), 1), x[:, None]), weights).mean()
    assert torch.autograd.grad(loss, output)[0].abs() < 1e-10


def test_rounds_of_weighting_add_up():
    mean = MU
    for _ in range(3):
        x = normal(50_000, mean)
        mean = (reward_weights(C * x, temperature=TAU) * x).mean().item()
    assert mean == pytest.approx(MU + 3 * C * S / TAU, rel=2e-3)
