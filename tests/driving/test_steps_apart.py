"""Steps whose graphs hang together are walked apart: the record's log-probabilities, each step's own gradient, one denoiser call a step."""

import pytest
import torch
from policies_again import changed, policy_of, with_momentum
from torch import nn

from diffusers_align import Policy
from tests.families.cases import CASES

PROMPTS, SEEDS = ["a cat", "a dog"], [1, 2]


def with_late_momentum(policy: Policy, cut: bool = False) -> None:
    """The graphs of the first two steps have nothing in common."""
    with_momentum(policy, cut, read_from=2)


def with_an_embedding(policy: Policy, cut: bool = False) -> None:
    """All steps add what a parameter that is made in the call, as normalizers do when they are moved, gave before the first of them."""
    memory = {}

    def prepared(stock, *args, **kwargs):
        made = nn.Parameter(torch.ones(())).sin()
        memory["added"] = made.detach() if cut else made
        return stock(*args, **kwargs)

    policy.pipeline.unet.register_forward_hook(lambda module, arguments, output: (output[0] + memory["added"],))
    changed(policy.pipeline, "prepare_latents", prepared)


def replayed(policy: Policy, trajectory) -> tuple[list[float], torch.Tensor, int]:
    """The errors of the log-probabilities, the gradient of their sum by a `backward` at each step, and the denoiser calls that it took."""
    errors, calls = [], []
    parameters = policy.trainable_parameters()
    for parameter in parameters:
        parameter.grad = None

    def on_step(k, kernel):
        log_prob = kernel.log_prob(trajectory.actions[:, k])
        errors.append(float((log_prob - trajectory.log_probs[:, k]).abs().max()))
        log_prob.sum().backward()

    forward = policy.pipeline.unet.forward
    policy.pipeline.unet.forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    policy.replay(trajectory, on_step)
    del policy.pipeline.unet.forward
    return errors, torch.cat([p.grad.flatten() for p in parameters]), len(calls)


@pytest.mark.parametrize("carry", [with_momentum, with_late_momentum, with_an_embedding])
def test_each_step_has_its_own_gradient(carry):
    found = {}
    for cut in (False, True):
        policy = policy_of()
        policy.add_lora(4)
        with torch.no_grad():
            for parameter in policy.trainable_parameters():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        carry(policy, cut)
        trajectory = policy.rollout(PROMPTS, seeds=SEEDS)
        found[cut] = [replayed(policy, trajectory) for _ in range(2)]
    steps = len(trajectory.noisy_steps)
    for errors, gradient, _ in found[False]:
        assert errors == [0.0] * steps
        torch.testing.assert_close(gradient, found[True][0][1], rtol=1e-4, atol=1e-5)
    assert found[True][0][1].abs().max() > 0
    assert [calls for *_, calls in found[True]] == [steps, steps]  # nothing to walk apart
    assert found[False][1][2] == steps  # each step's call serves the walks after it


def test_steps_apart_are_remembered_by_the_kind_of_call():
    policy = policy_of()
    policy.add_lora(4)
    with_momentum(policy)
    trajectory = policy.rollout(PROMPTS, seeds=SEEDS)
    with torch.no_grad():
        policy.replay(trajectory, lambda k, kernel: None)
    assert policy.steps_apart == {}
    replayed(policy, trajectory)
    assert list(policy.steps_apart.values()) == [True]


def test_a_cache_that_the_denoiser_fills_has_its_gradient():
    """Keys and values of the prompt are the same ones at each step, whether they are kept from the first on or computed anew."""
    case, found = CASES["QwenImage21Pipeline"][0], []
    for kept in (True, False):
        policy = Policy(case.build(), **{**case.call, "use_kv_cache": kept})
        trajectory = policy.rollout(list(case.prompts), seeds=SEEDS, per_sample=case.per_sample)
        policy.add_lora(4, init_lora_weights=False)
        for i, parameter in enumerate(policy.trainable_parameters()):
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(i))
        gradients = []
        policy.replay(trajectory, lambda k, kernel: gradients.append(gradient_of(policy, kernel.mean.square().mean())))  # noqa: B023
        k = trajectory.noisy_steps[-1]
        alone = gradient_of(policy, policy.transition(trajectory, k).mean.square().mean())
        torch.testing.assert_close(alone, gradients[-1], rtol=1e-4, atol=1e-7)
        found.append(torch.stack(gradients))
    assert found[0][-1].abs().max() > 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-6)


def gradient_of(policy: Policy, value: torch.Tensor) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, policy.trainable_parameters(), materialize_grads=True)])
