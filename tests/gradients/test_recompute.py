"""Activations that are computed again are those of the first time."""

import pytest
import torch
from torch import nn

from diffusers_align import Policy
from diffusers_align.gradients.recompute import recomputed, without_activations
from diffusers_align.gradients.rollout import differentiable_rollout
from tests.families.cases import CASES


@pytest.mark.parametrize("name", ["StableDiffusionPAGPipeline", "StableDiffusionGLIGENPipeline"])
def test_what_a_pipeline_sets_for_its_call_is_set_when_the_gradient_comes_back(name):
    """Perturbed attention's processors, the grounding layers' switch."""
    case = CASES[name][0]
    policy = Policy(case.build(), **case.call)
    condition, parameters = policy.condition(list(case.prompts), seeds=[1, 2]), policy.add_lora(rank=2)
    before = dict(policy.pipeline.unet.attn_processors)

    def gradients(checkpoint):
        images = differentiable_rollout(policy, condition, grad_steps=[0, 2], checkpoint=checkpoint).images
        return torch.autograd.grad(images.square().mean(), parameters)

    kept, again = gradients(False), gradients(True)
    assert any(gradient.abs().max() > 0 for gradient in kept)
    for a, b in zip(kept, again):
        torch.testing.assert_close(a, b)
    assert policy.pipeline.unet.attn_processors == before


class Popping(nn.Module):
    """Uses up the list that it is given, as denoisers do with a control net's residuals."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x, residuals):
        x = self.layer(x)
        while residuals:
            x = (x + residuals.pop()).tanh()
        return x


def test_lists_that_a_denoiser_uses_up_are_whole_again_and_the_callers_untouched():
    torch.manual_seed(0)
    module, x, residuals = Popping(), torch.randn(3, 2), [torch.randn(3, 2), torch.randn(3, 2)]
    expected = torch.autograd.grad(module(x, list(residuals)).sum(), module.layer.weight)[0]
    output = recomputed(module.forward, x, residuals=residuals)
    assert torch.equal(torch.autograd.grad(output.sum(), module.layer.weight)[0], expected)
    assert len(residuals) == 2


class Remembering(nn.Module):
    """Keeps the features of the frame before until its call has ended, as autoencoders of videos do."""

    def __init__(self):
        super().__init__()
        self.layer, self.before = nn.Linear(2, 2), None

    def forward(self, frames):
        out = []
        for x in frames:
            x = self.layer(x) if self.before is None else (self.layer(x) + self.before).tanh()
            self.before = x
            out.append(x)
        self.before = None
        return torch.stack(out).sum()


def test_a_model_that_remembers_in_a_call_has_forgotten_when_the_gradient_is_back():
    """The second run goes to its end, not to the last tensor that the way back needs: the next call would begin in the midst of this one."""
    torch.manual_seed(0)
    module, frames = Remembering(), torch.randn(3, 4, 2)
    expected = torch.autograd.grad(module(frames), module.layer.weight)[0]
    for _ in range(2):
        output = without_activations(lambda: module(frames))
        assert torch.equal(torch.autograd.grad(output, module.layer.weight)[0], expected)
        assert module.before is None


def test_a_call_that_reads_a_cache_is_not_computed_again():
    """Pipelines empty their caches at their end, before a gradient comes back."""

    class Cache:
        kept = torch.ones(3, requires_grad=True)

    x, cache, calls = torch.ones(3, requires_grad=True), Cache(), []
    output = recomputed(lambda x, cache: calls.append(1) or (x * cache.kept).sin(), x, cache=cache)
    cache.kept = None
    output.sum().backward()
    assert len(calls) == 1
    torch.testing.assert_close(x.grad, torch.ones(3).cos())
