"""Decoding with gradients: some frames, checkpoints, autoencoders that are cast."""

import pytest
import torch
from differentiated import Subject, close, score, subject, weights
from tiny_pipelines import FAMILIES

from diffusers_align import Policy
from diffusers_align.gradients.decoding import decode_latents


@pytest.mark.parametrize("family", ["wan", "cogvideox", "ltx"])
@pytest.mark.parametrize("frames", [[0], [1, 3], [4, 0]])
def test_some_frames_are_those_of_the_whole_video(family, frames):
    it = subject(family)
    whole, part = it.rollout([3]), it.rollout([3], frames=frames)
    assert part.images.shape == (2, len(frames), 3, *whole.images.shape[-2:])
    close(part.images, whole.images[:, frames], 1e-4)
    w = weights(part.images)
    close(it.gradient((part.images * w).sum()), it.gradient((whole.images[:, frames] * w).sum()), 1e-3)


def test_a_causal_autoencoder_decodes_no_later_latents():
    it, lengths = Subject("wan"), []
    vae = it.policy.pipeline.vae
    decode = vae.decode
    vae.decode = lambda z, *args, **kwargs: (lengths.append(tuple(z.shape[2:])), decode(z, *args, **kwargs))[1]
    it.rollout([3], frames=[0], decode_checkpoint=False)
    assert lengths == [(2, 4, 4), (1, 4, 4), (1, 4, 4)], "two looks at a crop, then the first latent alone"


def test_frames_that_do_not_exist():
    with pytest.raises(ValueError, match="frames 0 to 4"):
        subject("wan").rollout([3], frames=[5])
    with pytest.raises(ValueError, match="images, not videos"):
        subject("sd3").rollout([3], frames=[0])


@pytest.mark.parametrize("family", ["sd15", "flux", "wan"])
def test_decoding_with_a_checkpoint_is_decoding(family):
    it = subject(family, "DDIMScheduler" if family == "sd15" else None)
    latents = it.rollout([], decode=False).latents.requires_grad_()
    with torch.enable_grad():
        plain, recomputed = it.policy.decode(latents, it.condition), decode_latents(it.policy, latents, it.condition)
    assert torch.equal(plain, recomputed)
    gradients = [torch.autograd.grad(score(images).sum(), latents)[0] for images in (recomputed, plain)]
    close(*gradients, 1e-6)


@pytest.mark.parametrize("checkpoint", [True, False])
def test_an_autoencoder_that_is_cast_for_the_decoding_has_a_way_back(checkpoint):
    """Its weights are in half precision before and after."""
    gradients = []
    for dtype in (torch.float32, torch.float16):
        policy = Policy(FAMILIES["sdxl"].build().to(dtype), **FAMILIES["sdxl"].call)
        assert policy.pipeline.vae.config.force_upcast
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        images = decode_latents(policy, latents, policy.condition(["a cat"], seeds=[1]), checkpoint=checkpoint)
        assert policy.pipeline.vae.dtype == dtype
        gradients.append(torch.autograd.grad(score(images.float()).sum(), latents)[0].float())
    close(*gradients, 2e-2)
