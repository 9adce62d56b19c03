"""The reward in the loss, and the distance to the reference."""

import pytest
import torch
from reward_gradients import conditioned, loss_args, tiny

from diffusers_align.gradients.rollout import differentiable_rollout
from diffusers_align.training.gradient import losses
from diffusers_align.training.gradient.losses import distance_to_reference, scored_sum, total_loss


@pytest.mark.parametrize("reward_map, expected", [("none", [-1.0, -3.0]), ("hinge", [1.0, 0.0]), ("distance", [1.0, 1.0]), ("shortfall", [1.0, -1.0])])
def test_the_reward_in_the_loss(reward_map, expected):
    args = loss_args(reward_map=reward_map, reward_target=None if reward_map == "none" else 2.0, reward_scale=0.5)
    loss = losses.reward_map(args)(torch.tensor([1.0, 3.0, torch.nan]))
    assert loss[:2].tolist() == [0.5 * e for e in expected] and loss[2].isnan()
    assert scored_sum(loss) == 0.5 * sum(expected)


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_the_distance_to_the_reference(family):
    """The policy's own KL where there is noise, the squared difference of outputs where there is none."""
    policy = tiny(family)
    stochastic = differentiable_rollout(policy, conditioned(policy), grad_steps=[1, 2], stochastic=True, decode=False)
    trajectory = policy.rollout(conditioned(policy))
    new = policy.transitions(trajectory, [1, 2])
    with policy.reference():
        old = policy.transitions(trajectory, [1, 2])
        own = differentiable_rollout(policy, conditioned(policy), grad_steps=[1], decode=False)
        assert distance_to_reference(policy, own).abs().max() == 0
    kl = distance_to_reference(policy, stochastic)
    expected = sum(new[k].kl(old[k]) for k in (1, 2)) / 2 / trajectory.final[0].numel()
    torch.testing.assert_close(kl.detach(), expected.to(kl), rtol=1e-3, atol=0)
    silent = differentiable_rollout(policy, conditioned(policy), grad_steps=[1], decode=False)
    assert (distance_to_reference(policy, silent) > 0).all()
    logged = {"kl": []}
    total = total_loss(policy, stochastic, torch.ones(2), loss_args(kl_weight=2.0), logged)
    torch.testing.assert_close(total, 1 + 2 * kl)
    assert logged["kl"] == [pytest.approx(kl.mean().item())]


@pytest.mark.parametrize("family, stochastic", [("sd15", False), ("sd15", True), ("sd3", False)])
def test_the_distance_has_its_whole_gradient(family, stochastic):
    """Over several steps, against a finite difference: each state depends on the weights, and both models on the state."""
    policy = tiny.__wrapped__(family)
    policy.pipeline.to(torch.float64)
    parameters = policy.trainable_parameters()

    def distance():
        rollout = differentiable_rollout(policy, conditioned(policy), grad_steps=range(4), stochastic=stochastic, decode=False)
        return distance_to_reference(policy, rollout).sum()

    found = torch.autograd.grad(distance(), parameters, allow_unused=True)
    norm = sum(g.square().sum() for g in found if g is not None).sqrt()
    sides = []
    for epsilon in (1e-4, -2e-4):
        for parameter, g in zip(parameters, found):
            parameter.data += 0 if g is None else epsilon * g / norm
        sides.append(distance().item())
    assert (sides[0] - sides[1]) / 2e-4 == pytest.approx(float(norm), rel=1e-3)
