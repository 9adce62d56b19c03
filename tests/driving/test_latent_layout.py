"""Latents encoded in half precision, and under a condition that holds a part of what is decoded."""

from unittest.mock import Mock

import diffusers
import pytest
import torch
from tiny_pipelines import FAMILIES

from diffusers_align import Policy
from diffusers_align.condition import Condition
from diffusers_align.driving.latent_layout import LatentLayout, in_float32
from tests.families.cases import CASES
from tests.families.parts import quiet, seeded

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


def of_case(name: str, variant: str = "") -> tuple[Policy, Condition]:
    """The policy and the condition of two samples of a pipeline in the table."""
    torch.set_num_threads(1)
    case = next(case for case in CASES[name] if case.variant == variant)
    policy = Policy(quiet(case.build()), **case.call)
    return policy, policy.condition(list(case.prompts), seeds=[11, 12], per_sample=case.per_sample)


def some_images(*shape: int) -> torch.Tensor:
    return torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_what_inpainting_keeps_is_the_conditions_own_for_each_sample():
    policy, condition = of_case("StableDiffusionInpaintPipeline", "blending")
    images, vae = some_images(3, 16, 16), policy.pipeline.vae
    latents = policy.encode(images, condition)
    with policy.noise(condition, deterministic=False):
        kept = policy.drive(condition, lambda step: torch.zeros_like(step.sample))[0]  # where the pipeline blends, the picture that it was given
    own = vae.encode(images * 2 - 1).latent_dist.mode() * vae.config.scaling_factor
    painted = torch.zeros(2, 1, 1, latents.shape[-1], dtype=torch.bool)
    half = latents.shape[-1] // 2
    painted[0, ..., :half] = painted[1, ..., half:] = True
    assert kept.abs().max() > 0.1
    torch.testing.assert_close(latents, torch.where(painted, own, kept), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_each_sample_and_each_batch_is_looked_at_for_what_it_keeps():
    """The first sample may keep nothing, and a call before may have kept nothing, where others do."""
    policy, condition = of_case("StableDiffusionInpaintPipeline", "blending")
    images, masks = some_images(3, 16, 16), condition.per_sample["mask_image"]
    right, plain = policy.encode(images, condition), policy.pipeline.vae.encode(images * 2 - 1).latent_dist.mode() * policy.pipeline.vae.config.scaling_factor
    whole = [torch.ones_like(mask) for mask in masks]

    def encoded(policy, masks):
        own = {**condition.per_sample, "mask_image": masks}
        return policy.encode(images, policy.condition(condition.prompts, seeds=[11, 12], per_sample=own))

    fresh, _ = of_case("StableDiffusionInpaintPipeline", "blending")
    torch.testing.assert_close(encoded(fresh, whole), plain, rtol=1e-4, atol=1e-4)
    mixed = encoded(fresh, [whole[0], masks[1]])
    torch.testing.assert_close(mixed, torch.stack([plain[0], right[1]]), rtol=1e-4, atol=1e-4)
    assert torch.equal(encoded(fresh, masks), right)
    shared = Policy(fresh.pipeline, **fresh.call_kwargs, image=condition.per_sample["image"][:1], mask_image=masks[:1])
    shared.encode(images[:1])
    torch.testing.assert_close(shared.encode(images[:1], shared.condition(condition.prompts[:1], seeds=[11])), right[:1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_pictures_that_hold_nothing_cost_no_layout_a_sample(monkeypatch):
    policy, condition = of_case("StableDiffusionImg2ImgPipeline")
    images, found, find = some_images(3, 16, 16), [], LatentLayout.find
    monkeypatch.setattr(LatentLayout, "find", lambda *args: found.append(1) or find(*args))
    first = policy.encode(images, condition)
    driven = Mock(wraps=policy.drive)
    monkeypatch.setattr(policy, "drive", driven)
    assert torch.equal(policy.encode(images, condition), first) and len(found) == 1 and not driven.called, "one picture keeps the same part whatever it shows"


@torch.no_grad()
def test_a_given_first_frame_is_no_part_of_the_latents():
    policy, condition = of_case("LTXImageToVideoPipeline")
    videos, vae = some_images(5, 3, 32, 32), policy.pipeline.vae
    latents = policy.encode(videos, condition)
    z = vae.encode(videos.transpose(1, 2) * 2 - 1).latent_dist.mode()
    expected = (z - vae.latents_mean.view(1, -1, 1, 1, 1)) / vae.latents_std.view(1, -1, 1, 1, 1)
    torch.testing.assert_close(latents, expected[:, :, 1:], rtol=1e-4, atol=1e-4)


def test_latents_that_nothing_is_decoded_from_are_refused_where_the_pipeline_does_not_say_what_they_are():
    policy, condition = of_case("UniDiffuserPipeline")
    with pytest.raises(ValueError, match="of 272 latents do not reach the pixels under this condition.*returns no latents"):
        policy.encode(some_images(3, 16, 16), condition)


def test_a_condition_that_holds_everything_is_refused():
    policy, condition = of_case("StableDiffusionInpaintPipeline", "blending")
    nothing = [torch.zeros_like(mask) for mask in condition.per_sample["mask_image"]]
    condition = policy.condition(condition.prompts, seeds=[11, 12], per_sample={**condition.per_sample, "mask_image": nothing})
    with pytest.raises(ValueError, match="latents to 0 of 256 values"):
        policy.encode(some_images(3, 16, 16), condition)


@torch.no_grad()
def test_an_autoencoder_without_a_distribution_encodes():
    policy = make("sd15", torch.float32)
    policy.pipeline.vae = vae = seeded(
        diffusers.AutoencoderTiny, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)
    )
    images = some_images(3, 16, 16)
    torch.testing.assert_close(policy.encode(images), vae.encode(images * 2 - 1).latents * vae.config.scaling_factor, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_pictures_of_an_autoencoder_with_an_alpha_channel_are_opaque():
    case = CASES["QwenImage21Pipeline"][0]
    policy = Policy(case.build(), **case.call)
    condition = policy.condition(list(case.prompts), seeds=[1, 2], per_sample=case.per_sample)
    images = torch.rand(2, 3, 1, 1).expand(2, 3, 64, 64)
    actual = policy.decode(policy.encode(images, condition), condition)
    vae, pixels = policy.pipeline.vae, torch.cat([images * 2 - 1, torch.ones(2, 1, 64, 64)], 1)[:, :, None]
    decoded = (vae.decode(vae.encode(pixels).latent_dist.mode()).sample[:, :, 0] / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(actual, decoded[:, :3] * decoded[:, 3:] + 1 - decoded[:, 3:], rtol=1e-4, atol=1e-4)
