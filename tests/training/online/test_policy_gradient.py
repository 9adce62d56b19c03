"""The update of an epoch: what is computed at which steps, and that shares of it have the mean of the whole."""

from contextlib import contextmanager, nullcontext
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch

from diffusers_align.driving.forwards import Forwards
from diffusers_align.training.online import policy_gradient
from diffusers_align.training.online.policy_gradient import policy_gradient_epoch
from diffusers_align.transition import GaussianTransition

STEPS, SAMPLES = [0, 1, 2, 3], 2


class Policy:
    """Kernels of four steps whose means are rows of a weight, and 0 under the pretrained model; `asked` are the steps of its passes."""

    scheduler = SimpleNamespace(config={})  # no window to set

    def __init__(self):
        self.weight, self.asked, self.forwards, self.pretrained = torch.nn.Parameter(torch.tensor([1.0, 2.0, -1.0, 0.5])), [], [], False

    @contextmanager
    def reference(self):
        self.pretrained = True
        yield
        self.pretrained = False

    def replay(self, trajectory, on_step, steps, forwards=None):
        self.forwards.append(forwards)
        if self.pretrained:
            self.asked.append(steps)
        for k in steps:
            on_step(k, GaussianTransition((0.0 if self.pretrained else 1.0) * self.weight[k].expand(SAMPLES, 3), torch.ones(1, 1)))


def kl_gradient(share):
    """The gradient of the KL alone, and the steps at which the pretrained model was asked."""
    policy, kls = updated(share)
    return policy.weight.grad, policy.asked, kls


def updated(share=1.0, steps=STEPS, **flags):
    """The policy after an epoch of the KL alone, and what was logged of it."""
    policy = Policy()
    trajectory = SimpleNamespace(actions=torch.zeros(SAMPLES, 4, 3), log_probs=torch.zeros(SAMPLES, 4), step_sizes=[0.25] * 4, final=torch.zeros(SAMPLES, 3))
    samples = SimpleNamespace(batches=[trajectory], index=[torch.arange(SAMPLES)], kernels=[])
    accelerator = SimpleNamespace(autocast=nullcontext, backward=lambda loss: loss.backward())
    run = SimpleNamespace(
        args=SimpleNamespace(seed=0, **flags), epoch=0, accelerator=accelerator, division=SimpleNamespace(batches_a_step=1, block=lambda b: b),
        explain_once=lambda *_: None, chunks=lambda number, size: [range(number)], loss_weight=lambda samples, chunk, steps: 1 / (SAMPLES * steps),
        optimizer_step=lambda: 0.0, epoch_metrics=lambda samples, diagnostics, norms, others: others,
    )  # fmt: skip
    metrics = policy_gradient_epoch(
        run, policy, samples, steps, lambda step: 0 * step.log_prob, clip_range=0.1, kl_weight=0.5, kl_share=share,
        kl=lambda step, reference: 0.5 * (step.transition.mean - reference.mean).square().mean(1),
    )  # fmt: skip
    return policy, metrics["kl"]


def test_without_a_share_the_kl_is_that_of_each_step():
    gradient, asked, kls = kl_gradient(1.0)
    torch.testing.assert_close(gradient, 0.5 * torch.tensor([1.0, 2.0, -1.0, 0.5]) / 4)
    assert asked == [STEPS] and kls == pytest.approx([0.5, 2.0, 0.5, 0.125])


@pytest.mark.parametrize("share, number", [(0.5, 2), (0.25, 1), (0.01, 1)])
def test_the_kl_at_a_share_of_the_steps_has_the_mean_of_all(monkeypatch, share, number):
    """Over every subset that may be drawn, the mean gradient is that of all steps."""
    whole, _, _ = kl_gradient(1.0)
    found = []
    for subset in combinations(STEPS, number):
        monkeypatch.setattr(policy_gradient, "some_of", lambda steps, share, key, subset=subset: list(subset))
        gradient, asked, kls = kl_gradient(share)
        assert asked == [list(subset)] and len(kls) == number
        found.append(gradient)
    torch.testing.assert_close(torch.stack(found).mean(0), whole)


def test_the_draw_has_the_asked_number_of_steps():
    assert {len(kl_gradient(share)[1][0]) for share in (0.5, 0.6)} == {2} and len(kl_gradient(0.75)[1][0]) == 3


@pytest.mark.parametrize(
    "flags, forwards",
    [
        ({}, None),
        ({"replay_steps_per_forward": 1, "unconditional_gradient": True}, None),
        ({"replay_steps_per_forward": 2, "unconditional_gradient": True}, Forwards(2)),
        ({"replay_steps_per_forward": 1, "unconditional_gradient": False}, Forwards(1, unconditional_gradient=False)),
    ],
)
def test_the_flags_say_how_both_models_are_evaluated(flags, forwards):
    policy, _ = updated(**flags)
    assert policy.forwards == [forwards, forwards]


def test_several_steps_a_forward_need_several_steps():
    with pytest.raises(ValueError, match="--replay_steps_per_forward 2 has no effect: one solver step"):
        updated(steps=[1], replay_steps_per_forward=2)
