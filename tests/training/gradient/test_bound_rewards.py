"""Rewards bound to their prompts, with gradients: masked, failing, in half precision."""

import time

import pytest
import torch
from reward_gradients import brightness, conditioned, tiny
from tiny_pipelines import FAMILIES

from diffusers_align import Policy
from diffusers_align.data.prompts import Prompt
from diffusers_align.gradients.rollout import differentiable_rollout
from diffusers_align.rewards import InvalidReward, RewardError, RewardTimeout
from diffusers_align.training.gradient.bound_rewards import BoundReward
from diffusers_align.training.gradient.losses import scored_sum
from diffusers_align.training.online.scoring import Scorer


def undefined_of_dogs(images, prompts, **columns):
    """0/0 where the prompt has a dog: NaN on the way there and, even of a gradient of 0, on the way back."""
    known = torch.tensor([0.0 if "dog" in prompt else 1.0 for prompt in prompts])
    return images.flatten(1).mean(1) * known / known


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_a_sample_that_could_not_be_scored_has_no_part_in_the_gradient(family):
    """Of a reward that divides 0 by 0 for one of two samples, the gradient is that of the other."""
    policy, asked = tiny(family), [Prompt("a cat"), Prompt("a dog")]
    gradients = []
    for reward in (undefined_of_dogs, lambda images, prompts, **columns: images.flatten(1).mean(1) * torch.tensor([1.0, 0.0])):
        rollout = differentiable_rollout(policy, conditioned(policy), grad_steps=[2, 3])
        rewards = BoundReward(reward, asked, "mask")(rollout.images.float())
        found = torch.autograd.grad(scored_sum(-rewards), policy.trainable_parameters(), allow_unused=True)
        gradients.append(torch.cat([g.flatten() for g in found if g is not None]))
    assert gradients[0].isfinite().all() and gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-9)


def test_a_masked_image_gets_the_gradient_zero_and_no_hook_where_nothing_is_masked():
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    rewards = BoundReward(undefined_of_dogs, [Prompt("a cat"), Prompt("a dog")], "mask")(images)
    (found,) = torch.autograd.grad(scored_sum(rewards), images)
    assert torch.equal(found[0], torch.full((3, 4, 4), 1 / 48)) and not found[1].any()
    with pytest.raises(InvalidReward, match="a dog"):
        BoundReward(undefined_of_dogs, [Prompt("a dog")], "error")(images[:1])


def raises_for_dogs(images, prompts, **columns):
    if any("dog" in prompt for prompt in prompts):
        raise KeyError("dog")
    return images.flatten(1).mean(1)


def sleeps(images, prompts, **columns):
    time.sleep(5)
    return images.flatten(1).mean(1)


def test_a_reward_that_fails_is_masked_or_named_as_the_flag_says():
    images, asked = torch.rand(2, 3, 4, 4, requires_grad=True), [Prompt("a cat"), Prompt("a dog")]
    rewards = BoundReward(raises_for_dogs, asked, "mask")(images)
    assert rewards[0] == images[0].mean() and rewards[1].isnan()
    (found,) = torch.autograd.grad(scored_sum(rewards), images)
    assert torch.equal(found[0], torch.full((3, 4, 4), 1 / 48)) and not found[1].any()
    with pytest.raises(RewardError, match="raised KeyError: 'dog', for 2 images of the prompts 'a cat', 'a dog'"):
        BoundReward(raises_for_dogs, asked, "error")(images)
    with pytest.raises(RewardTimeout, match="no answer in 0.05 s"):
        BoundReward(sleeps, asked, "error", 0.05)(images)
    late = BoundReward(sleeps, asked, "mask", 0.05)(images)
    assert late.isnan().all() and not torch.autograd.grad(scored_sum(late), images)[0].any()
    timed = BoundReward(brightness, asked, "error", 60.0)(images)
    torch.testing.assert_close(torch.autograd.grad(timed.sum(), images)[0], torch.full_like(images, 1 / 48))


def test_a_reward_that_leaves_the_graph_is_no_matter_of_masks():
    with pytest.raises(RewardError, match="requires grad"):
        BoundReward(lambda images, prompts, **columns: torch.tensor(images.numpy().mean((1, 2, 3))), [Prompt("a cat")], "mask")(
            torch.rand(1, 3, 4, 4, requires_grad=True)
        )


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_rewards_in_training_are_those_of_the_evaluation_in_bf16(family):
    """To the bit, although the roll-out around them runs under autocast."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).requires_grad_(False)

    def learned(images, prompts, **columns):
        return model(images.flatten(2).mean(2))[:, 0]

    policy = Policy(FAMILIES[family].build().to(torch.bfloat16), **FAMILIES[family].call)
    policy.add_lora(rank=2)
    asked = [Prompt("a cat"), Prompt("a dog")]
    with torch.autocast("cpu", torch.bfloat16):
        rollout = differentiable_rollout(policy, conditioned(policy), grad_steps=[3])
        trained = BoundReward(learned, asked, "error")(rollout.images.float())
    evaluated = [row["reward"] for row in Scorer(learned)(rollout.images.detach().float(), asked)]
    assert trained.dtype == torch.float32 and trained.requires_grad
    assert trained.tolist() == evaluated
