"""A pipeline that writes into what its own arithmetic needs has the gradient of one that does not, and copies are kept of its arithmetic alone."""

import pytest
import torch
from policies_again import changed, policy_of
from torch import nn

from diffusers_align import Policy, differentiable_rollout
from diffusers_align.driving.saved_apart import SavedApart
from tests.families.cases import CASES


def normalised(in_place: bool):
    """Pictures whose upper half is divided by the spread of the lower one."""

    def postprocess(stock, image, *args, **kwargs):
        image = image.clone()
        upper, lower = image[:, :, :4], image[:, :, 4:]
        scaled = upper * lower.std()
        if in_place:
            image[:, :, :4] = scaled
        else:
            image = torch.cat([scaled, lower], 2)
        return stock(image, *args, **kwargs)

    return postprocess


def test_what_is_written_into_afterwards_has_its_gradient():
    gradients = []
    for in_place in (True, False):
        policy = policy_of()
        policy.add_lora(4)
        changed(policy.pipeline.image_processor, "postprocess", normalised(in_place))
        images = differentiable_rollout(policy, policy.condition(["a cat"], seeds=[1]), grad_steps=[0, 1]).images
        images.square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.trainable_parameters()]))
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)


class Network(nn.Module):
    def forward(self, x):
        self.made = x.exp()  # which keeps its output
        return self.made


class Pipeline:
    def __init__(self):
        self.components = {"network": Network(), "tokenizer": None}

    def __call__(self, x, callback):
        inside = self.components["network"](x)
        outside = x.exp()
        return inside, outside, callback(x)


def test_networks_and_callbacks_keep_no_copies():
    pipeline, x = Pipeline(), torch.ones(2, requires_grad=True)
    with SavedApart().around(pipeline) as like_a_network:
        inside, outside, called = pipeline(x, like_a_network(torch.exp))
        with pytest.raises(ZeroDivisionError):
            like_a_network(lambda: 1 / 0)()
        again = x.exp()
    after = x.exp()
    for made, is_copied in ((inside, False), (outside, True), (called, False), (again, True), (after, False)):
        with torch.no_grad():
            made.add_(1)
        if is_copied:
            torch.testing.assert_close(torch.autograd.grad(made.sum(), x, retain_graph=True)[0], torch.ones(2).exp())
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                made.sum().backward()
    assert "forward" not in vars(pipeline.components["network"])


def test_directions_of_surfaces_have_a_gradient_through_decode():
    case = CASES["MarigoldNormalsPipeline"][0]
    policy = Policy(case.build(), **case.call)
    policy.pipeline.set_progress_bar_config(disable=True)
    condition = policy.condition(None, seeds=[1, 2], per_sample=dict(case.per_sample))
    latents = torch.randn(2, 4, 8, 8, requires_grad=True)
    images = policy.decode(latents, condition)
    assert images.min() >= 0 and images.max() <= 1  # the pipeline's own are in [-1, 1]
    torch.testing.assert_close((images * 2 - 1).norm(dim=1), torch.ones_like(images[:, 0]), rtol=1e-3, atol=1e-3)
    images.square().sum().backward()
    assert latents.grad.abs().sum() > 0
