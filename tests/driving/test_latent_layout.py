"""Latents encoded and decoded in half precision."""

import pytest
import torch
from tiny_pipelines import FAMILIES

from diffusers_align import Policy
from diffusers_align.driving.latent_layout import in_float32

pytestmark = [
    pytest.mark.filterwarnings("ignore:You have passed . text prompts:FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`upcast_vae` is deprecated:FutureWarning"),
]


def make(name: str, dtype: torch.dtype) -> Policy:
    torch.set_num_threads(1)
    return Policy(FAMILIES[name].build().to(dtype), **FAMILIES[name].call)


def test_an_autoencoder_that_overflows_in_float16_encodes_in_float32():
    policy = make("sd15", torch.float16)
    vae = policy.pipeline.vae
    vae.encoder.conv_in.weight.data.mul_(3e4)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert not vae.encode(images.half() * 2 - 1).latent_dist.mode().isfinite().all()
    with in_float32(vae):
        expected = vae.encode(images * 2 - 1).latent_dist.mode() * vae.config.scaling_factor
    torch.testing.assert_close(policy.encode(images).float(), expected, rtol=2e-3, atol=1e-4)


def test_the_autoencoders_own_weights_come_back_on_any_exception():
    policy = make("sd15", torch.bfloat16)
    vae = policy.pipeline.vae
    before = {name: (tensor.dtype, tensor.data_ptr()) for name, tensor in vae.state_dict().items()}
    with pytest.raises(KeyError), in_float32(vae):
        assert all(p.dtype == torch.float32 for p in vae.parameters())
        raise KeyError
    with pytest.raises(ValueError, match="pass images of the size"):
        policy.encode(torch.rand(1, 3, 64, 64))
    assert {name: (tensor.dtype, tensor.data_ptr()) for name, tensor in vae.state_dict().items()} == before
