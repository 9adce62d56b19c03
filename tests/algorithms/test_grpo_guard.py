"""GRPO-Guard: its ratio and its loss."""

import math

import pytest
import torch
from moved_policy import D, gradient, randn, step

from diffusers_align import FlowMatchSDEScheduler, GaussianTransition
from diffusers_align.algorithms.flow_cps import flow_cps_loss
from diffusers_align.algorithms.flow_grpo import flow_grpo_loss
from diffusers_align.algorithms.grpo_guard import grpo_guard_loss, guard_log_ratio
from diffusers_align.algorithms.reinforce import reinforce_loss

# --- GRPO-Guard --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("std_rows", [1, 6])
def test_the_guard_ratio_is_the_published_one_for_each_sample(std_rows):
    new, old, action = step(std_rows=std_rows)
    actual = guard_log_ratio(new.log_prob(action), old.log_prob(action), new.mean, old.mean, new.std, per_dim=D)
    assert actual.shape == (6,)
    for i in range(6):
        s = new.std.flatten()[i if std_rows > 1 else 0]
        log_prob, old_log_prob = (torch.distributions.Normal(t.mean[i], s).log_prob(action[i]).mean() for t in (new, old))
        expected = (log_prob - old_log_prob + (new.mean[i] - old.mean[i]).square().mean() / (2 * s**2)) * s
        torch.testing.assert_close(actual[i], expected, rtol=1e-9, atol=1e-12)


def test_ratio_norm_takes_bias_and_scale_out_of_every_step():
    spreads, means = [], []
    for std in (0.05, 0.4, 1.0):
        old = GaussianTransition(torch.zeros(4000, 3, 2, 2, dtype=torch.float64), torch.full((1, 1, 1, 1), std, dtype=torch.float64))
        new = GaussianTransition(old.mean + 0.02, old.std)
        action = std * randn(4000, 3, 2, 2)
        plain = (new.log_prob(action) - old.log_prob(action)) / D
        normalised = guard_log_ratio(new.log_prob(action), old.log_prob(action), new.mean, old.mean, new.std, per_dim=D)
        assert plain.mean() < -0.5 * 0.02**2 / (2 * std**2), "the bias that RatioNorm removes"
        assert normalised.mean().abs() < 4 * normalised.std() / 4000**0.5
        spreads.append(normalised.std())
        means.append(normalised.mean())
    torch.testing.assert_close(spreads[0], spreads[2], rtol=1e-6, atol=0)
    torch.testing.assert_close(means[0], means[2], rtol=1e-6, atol=1e-9)


def test_guard_gradients_are_alike_at_every_step_of_a_schedule():
    """d loss / d velocity of one advantage: 30 times apart for Flow-GRPO over ten steps, within the spread of 1 - sigma for the guard."""
    scheduler = FlowMatchSDEScheduler(shift=3.0, noise_level=0.7)
    scheduler.set_timesteps(10)
    sizes, plain, guarded = scheduler.sigmas.diff().abs().tolist(), [], []
    for k in range(9):
        velocity = torch.zeros(64, 12, requires_grad=True)
        transition = scheduler.transition(velocity, scheduler.timesteps[k], randn(64, 12).float())
        action, old = (transition.mean + transition.std * randn(64, 12, seed=k).float()).detach(), transition.mean.detach()
        log_prob, advantage = transition.log_prob(action), torch.ones(64, dtype=torch.float64)
        plain.append(gradient(reinforce_loss(log_prob, advantage, per_dim=12), velocity).norm())
        log_prob = scheduler.transition(velocity, scheduler.timesteps[k], randn(64, 12).float())
        log_ratio = guard_log_ratio(log_prob.log_prob(action), transition.log_prob(action).detach(), log_prob.mean, old, log_prob.std, per_dim=12)
        guarded.append(gradient(grpo_guard_loss(log_ratio, advantage, sizes[k], clip_range=1.0), velocity).norm())
    assert max(plain) / min(plain) > 20
    assert max(guarded) / min(guarded) < 5


def test_the_guard_loss_at_its_published_clip_range():
    log_ratio, advantage = torch.tensor([1e-4, -1e-4, 1e-6], dtype=torch.float64), torch.tensor([3.0, 3.0, -2.0], dtype=torch.float64)
    expected = torch.tensor([-3 * (1 + 2e-6), -3 * math.exp(-1e-4), 2 * math.exp(1e-6)], dtype=torch.float64) / 0.125
    torch.testing.assert_close(grpo_guard_loss(log_ratio, advantage, 0.125), expected, rtol=1e-14, atol=0)


# --- what they share ---------------------------------------------------------------------------------------------------


def test_before_an_update_each_variant_has_a_multiple_of_reinforces_gradient():
    transition, _, action = step(shift=0.0)
    advantage, std = randn(6, seed=3), 0.4
    new = lambda: transition.log_prob(action)  # noqa: E731
    base, old = gradient(reinforce_loss(new(), advantage, per_dim=D), transition.mean), new().detach()
    assert base.abs().min() > 0
    torch.testing.assert_close(gradient(flow_grpo_loss(new(), old, advantage, per_dim=D), transition.mean), base)
    torch.testing.assert_close(gradient(flow_cps_loss(new(), old, advantage, transition.std, per_dim=D), transition.mean), 2 * std**2 * base)
    log_ratio = guard_log_ratio(new(), old, transition.mean, transition.mean.detach(), transition.std, per_dim=D)
    torch.testing.assert_close(gradient(grpo_guard_loss(log_ratio, advantage, 0.1), transition.mean), std / 0.1 * base)
