import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from diffusers_align import FlowMatchSDEScheduler, GaussianTransition
from diffusers_align.algorithms.ddpo import ddpo_loss
from diffusers_align.algorithms.flow_grpo import flow_grpo_loss, gaussian_kl, official_kl
from diffusers_align.algorithms.reinforce import reinforce_loss
from diffusers_align.rl import batch_advantages, group_advantages

torch.set_num_threads(1)
SHAPE, D = (6, 3, 2, 2), 12
PPO_LOSSES = [ddpo_loss, flow_grpo_loss]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_probs_of_a_step(mean: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of fixed actions under a Gaussian step of the given mean."""
    actions = randn(*SHAPE, seed=1)
    return GaussianTransition(mean, torch.full((1, 1, 1, 1), 0.7, dtype=torch.float64)).log_prob(actions)


def gradient(loss: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss.sum(), mean)[0]


# the policy gradient and its clipping


def test_reinforce_gradient_is_the_score_times_the_advantage():
    mean, advantage = randn(*SHAPE).requires_grad_(), randn(6, seed=2)
    score = (randn(*SHAPE, seed=1) - mean.detach()) / 0.7**2
    expected = -advantage[:, None, None, None] * score
    torch.testing.assert_close(gradient(reinforce_loss(log_probs_of_a_step(mean), advantage), mean), expected)
    torch.testing.assert_close(gradient(reinforce_loss(log_probs_of_a_step(mean), advantage, per_dim=D), mean), expected / D)


@pytest.mark.parametrize("loss", PPO_LOSSES)
@pytest.mark.parametrize("per_dim", [1, D])
def test_at_ratio_one_ppo_has_exactly_reinforces_gradient(loss, per_dim):
    mean, advantage = randn(*SHAPE).requires_grad_(), randn(6, seed=2)
    log_prob = log_probs_of_a_step(mean)
    score_function = gradient(reinforce_loss(log_prob, advantage, per_dim=per_dim), mean)
    log_prob = log_probs_of_a_step(mean)
    ppo = gradient(loss(log_prob, log_prob.detach(), advantage, per_dim=per_dim), mean)
    assert score_function.abs().min() > 0
    torch.testing.assert_close(ppo, score_function, rtol=1e-15, atol=0)


@pytest.mark.parametrize("loss", PPO_LOSSES)
@pytest.mark.parametrize(
    ("log_ratio", "advantage", "survives"),
    [
        (+0.5, +1.0, False),  # already likelier than the clip allows: nothing more to gain
        (-0.5, -1.0, False),
        (-0.5, +1.0, True),  # moved the wrong way: the pessimistic side has no clip
        (+0.5, -1.0, True),
        (+0.1, +1.0, True),
        (-0.1, -1.0, True),
    ],
)
def test_gradient_vanishes_beyond_the_clip_on_the_gaining_side_only(loss, log_ratio, advantage, survives):
    log_prob, advantage = torch.tensor([log_ratio], dtype=torch.float64, requires_grad=True), torch.tensor([advantage], dtype=torch.float64)
    grad = gradient(loss(log_prob, torch.zeros(1, dtype=torch.float64), advantage, per_dim=1, clip_range=0.2), log_prob)
    torch.testing.assert_close(grad, -advantage * math.exp(log_ratio) if survives else torch.zeros_like(grad))


@pytest.mark.parametrize("loss", PPO_LOSSES)
def test_per_dim_divides_the_log_ratio(loss):
    log_prob, old, advantage = randn(6), randn(6, seed=1), randn(6, seed=2)
    per_sum, per_dim = loss(log_prob, old, advantage, per_dim=1, clip_range=0.2), loss(D * log_prob, D * old, advantage, per_dim=D, clip_range=0.2)
    torch.testing.assert_close(per_dim, per_sum)
    assert not torch.allclose(loss(log_prob, old, advantage, per_dim=D, clip_range=0.2), per_sum)


def test_flow_grpo_and_ddpo_have_the_same_policy_loss():
    log_prob, old, advantage = randn(64) / 100, randn(64, seed=1) / 100, randn(64, seed=2)
    for clip_range in (1e-4, 0.01):
        arguments = {"per_dim": D, "clip_range": clip_range}
        assert torch.equal(flow_grpo_loss(log_prob, old, advantage, **arguments), ddpo_loss(log_prob, old, advantage, **arguments))
    assert torch.equal(flow_grpo_loss(log_prob, old, advantage, per_dim=D), ddpo_loss(log_prob, old, advantage, per_dim=D, clip_range=1e-4))


@pytest.mark.parametrize("advantages", [batch_advantages, lambda r: group_advantages(r, torch.tensor([0, 0, 0, 1, 1, 1]))], ids=["batch", "group"])
def test_constant_reward_gives_no_gradient(advantages):
    mean, advantage = randn(*SHAPE).requires_grad_(), advantages(torch.full((6,), 0.3))
    old = log_probs_of_a_step(mean).detach() + 0.1
    for loss in (
        reinforce_loss(log_probs_of_a_step(mean), advantage),
        ddpo_loss(log_probs_of_a_step(mean), old, advantage, per_dim=D),
        flow_grpo_loss(log_probs_of_a_step(mean), old, advantage, per_dim=D),
    ):
        assert gradient(loss, mean).abs().max() == 0


def test_losses_keep_samples_apart():
    log_prob, old, advantage = randn(5), randn(5, seed=1), randn(5, seed=2)
    for loss in (
        lambda *x: reinforce_loss(x[0], x[2]),
        lambda *x: ddpo_loss(*x, per_dim=2, clip_range=0.1),
        lambda *x: flow_grpo_loss(*x, per_dim=2, clip_range=0.1),
    ):
        whole = loss(log_prob, old, advantage)
        assert whole.shape == (5,)
        singles = [loss(log_prob[i : i + 1], old[i : i + 1], advantage[i : i + 1]) for i in range(5)]
        assert torch.equal(whole, torch.cat(singles))


@pytest.mark.parametrize("loss", PPO_LOSSES)
def test_policy_losses_pass_gradcheck(loss):
    # log-ratios between 0.02 and 1 of either sign: none on a kink of the clip at 0.2
    old = randn(6)
    log_prob = (old + torch.tensor([0.02, -0.05, 0.5, -0.6, 1.0, -1.0], dtype=torch.float64)).requires_grad_()
    advantage = torch.tensor([1, -2, 3, -1, -2, 0.5], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: loss(x, old, advantage, per_dim=1, clip_range=0.2), log_prob)
    assert torch.autograd.gradcheck(lambda x: reinforce_loss(x, advantage, per_dim=3), log_prob)


# the two forms of the KL


@pytest.mark.parametrize("std_shape", [(1, 1, 1, 1), (6, 1, 1, 1)])
def test_gaussian_kl_is_torchs_per_dimension(std_shape):
    mean, reference, std = randn(*SHAPE), randn(*SHAPE, seed=1), 0.3 + randn(*std_shape, seed=2).abs()
    expected = kl_divergence(Normal(mean, std.expand(SHAPE)), Normal(reference, std.expand(SHAPE))).sum((1, 2, 3)) / D
    torch.testing.assert_close(gaussian_kl(mean, reference, std), expected)
    torch.testing.assert_close(gaussian_kl(mean, reference, std), GaussianTransition(mean, std).kl(GaussianTransition(reference, std)) / D)
    assert gaussian_kl(mean, mean, std).abs().max() == 0


def test_official_kl_is_the_gaussian_one_times_the_steps_length():
    mean, reference, std = randn(*SHAPE), randn(*SHAPE, seed=1), torch.full((1, 1, 1, 1), 0.4, dtype=torch.float64)
    torch.testing.assert_close(official_kl(mean, reference, std, 0.125), 0.125 * gaussian_kl(mean, reference, std))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_official_kl_is_the_published_formula_at_the_schedulers_steps(shift):
    scheduler = FlowMatchSDEScheduler(shift=shift, noise_level=0.7)
    scheduler.set_timesteps(10)
    sigmas, x, steps = scheduler.sigmas.double(), randn(*SHAPE).float(), scheduler.stochastic_steps.nonzero().flatten().tolist()
    assert len(steps) >= 9
    for k in steps:
        policy, reference = (scheduler.transition(randn(*SHAPE, seed=s).float(), scheduler.timesteps[k], x) for s in (1, 2))
        # yifan123/flow_grpo: std_dev_t = sqrt(sigma / (1 - sigma)) * 0.7, with sigmas[1] for a sigma of 1; its KL knows no dt
        singular = sigmas[1] if sigmas[k] == 1 else sigmas[k]
        std_dev_t = 0.7 * (sigmas[k] / (1 - singular)).sqrt()
        published = ((policy.mean - reference.mean).double() ** 2).mean((1, 2, 3)) / (2 * std_dev_t**2)
        step_size = (sigmas[k] - sigmas[k + 1]).item()
        torch.testing.assert_close(official_kl(policy.mean, reference.mean, policy.std, step_size).double(), published, rtol=1e-5, atol=0)
        torch.testing.assert_close(policy.std.double().flatten()[0] / math.sqrt(step_size), std_dev_t, rtol=1e-5, atol=0)


def test_kls_pass_gradcheck_and_pull_towards_the_reference():
    mean, reference, std = randn(2, 3, 2).requires_grad_(), randn(2, 3, 2, seed=1), torch.full((1, 1, 1), 0.4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda m: gaussian_kl(m, reference, std), mean)
    assert torch.autograd.gradcheck(lambda m: official_kl(m, reference, std, 0.1), mean)
    pull = gradient(gaussian_kl(mean, reference, std), mean)
    torch.testing.assert_close(pull, (mean.detach() - reference) / (0.4**2 * 6))
