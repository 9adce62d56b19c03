"""A tail that overwrites what its own gradient needs still has the right one."""

import torch
from diffusers import AutoencoderKL

from diffusers_align import Policy
from diffusers_align.driving.tail_edits import tail_may_edit
from tests.families.cases import CASES


class Pipeline:
    """Decodes, and brings what is decoded to unit length in place."""

    def __init__(self, vae):
        self.vae = vae

    def __call__(self, latents, in_place=True):
        x = self.vae.decode(latents).sample * 1
        if in_place:
            x /= x.norm(dim=1, keepdim=True)
            return x
        return x / x.norm(dim=1, keepdim=True)


def test_the_gradient_is_that_of_a_tail_without_edits():
    torch.manual_seed(0)
    pipeline = Pipeline(AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4))
    latents, weights = torch.randn(1, 4, 4, 4, requires_grad=True), torch.randn(1, 3, 4, 4)
    with tail_may_edit(pipeline):
        edited = pipeline(latents)
    (slope,) = torch.autograd.grad((edited * weights).sum(), latents)
    (expected,) = torch.autograd.grad((pipeline(latents, in_place=False) * weights).sum(), latents)
    torch.testing.assert_close(slope, expected)
    assert slope.abs().sum() > 0


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
