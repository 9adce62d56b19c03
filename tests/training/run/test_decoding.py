"""Decoding in parts: what diffusers has for it is on, its result is the whole's, and who cannot is named."""

import logging
from argparse import Namespace

import diffusers
import pytest
import torch
from tiny_pipelines import FAMILIES
from torch import nn

from diffusers_align import Policy
from diffusers_align.gradients.decoding import decode_latents
from diffusers_align.training.run.decoding import decode_in_parts
from diffusers_align.training.run.model_loading import load_pipeline
from tests.families.cases import audio, ltx2
from tests.families.cases.ltx import ltx_vae
from tests.families.parts import seeded

torch.set_num_threads(1)
SEEDS = [1, 2, 3]


def calls_of(module):
    """The batch sizes with which a module is called."""
    found = []
    module.register_forward_pre_hook(lambda module, args: found.append(tuple(args[0].shape)))
    return found


@pytest.mark.parametrize("family", ["sd15", "wan"])
def test_slices_are_the_whole(family):
    chosen = FAMILIES[family]
    policy = Policy(chosen.build(), **chosen.call)
    trajectory = policy.rollout(["a", "b", "c"], seeds=SEEDS)
    with torch.no_grad():
        whole = policy.decode(trajectory.final, trajectory.condition)
    decode_in_parts(policy.pipeline, "vae_slicing")
    decoder = calls_of(policy.pipeline.vae.decoder)
    with torch.no_grad():
        sliced = policy.decode(trajectory.final, trajectory.condition)
    assert {shape[0] for shape in decoder} == {1} and len(decoder) >= 3
    torch.testing.assert_close(sliced, whole, rtol=0, atol=1e-5)
    latents = trajectory.final.clone().requires_grad_()
    decode_latents(policy, latents, trajectory.condition).sum().backward()
    assert latents.grad.abs().flatten(1).sum(1).min() > 0, "each sample's gradient comes back"


@torch.no_grad()
def test_tiles_of_a_sound_are_the_whole():
    vae = seeded(
        diffusers.AutoencoderOobleck, encoder_hidden_size=6, downsampling_ratios=[2, 2], decoder_channels=3, decoder_input_channels=3, audio_channels=2,
        channel_multiples=[2, 4], sampling_rate=4,
    )  # fmt: skip
    latents = torch.randn(1, 3, 300, generator=torch.Generator().manual_seed(0))
    whole = vae.decode(latents).sample
    vae.tile_latent_min_length, vae.tile_latent_overlap = 160, 60
    decode_in_parts(Namespace(components={"vae": vae}), "vae_tiling")
    decoder = calls_of(vae.decoder)
    torch.testing.assert_close(vae.decode(latents).sample, whole, rtol=0, atol=1e-5)
    assert len(decoder) > 1 and max(shape[-1] for shape in decoder) <= 160


@torch.no_grad()
def test_tiles_of_a_picture_are_the_whole_but_for_their_seams():
    chosen = FAMILIES["sd15"]
    pipeline = chosen.build()
    vae, latents = pipeline.vae, torch.randn(1, 4, 24, 24, generator=torch.Generator().manual_seed(0))
    vae.tile_latent_min_size, vae.tile_sample_min_size, vae.tile_overlap_factor = 16, 32, 0.25
    whole = vae.decode(latents).sample
    decode_in_parts(pipeline, "vae_tiling")
    decoder = calls_of(vae.decoder)
    tiled = vae.decode(latents).sample
    assert len(decoder) == 4 and tiled.shape == whole.shape
    assert (tiled - whole).abs().mean() < 0.2 * whole.std(), "a layer that averages over the picture sees a tile alone: no closer on random weights"


@torch.no_grad()
def test_long_videos_are_decoded_some_frames_at_a_time():
    vae, latents = ltx_vae(), torch.randn(1, 8, 12, 4, 4, generator=torch.Generator().manual_seed(0))
    whole, ratio = vae.decode(latents).sample, vae.temporal_compression_ratio
    vae.tile_sample_min_num_frames, vae.tile_sample_stride_num_frames = 6 * ratio, 4 * ratio
    decode_in_parts(Namespace(components={"vae": vae}), "vae_tiling")
    decoder = calls_of(vae.decoder)
    tiled = vae.decode(latents).sample
    assert len(decoder) == 3 and max(shape[2] for shape in decoder) == 7, "with one latent before each tile"
    assert tiled.shape == whole.shape
    assert not torch.equal(tiled, whole), "its layers see frames before and after, which end at a tile's border"
    short = latents[:, :, :5]
    vae.use_framewise_decoding = False
    expected = vae.decode(short).sample
    vae.use_framewise_decoding = True
    assert torch.equal(vae.decode(short).sample, expected), "what fits into one tile is as before"


@torch.no_grad()
def test_frames_that_would_come_out_otherwise_are_left_together():
    """Mochi's frame-wise decoding hands caches on, and makes another video on random weights."""
    vae = seeded(
        diffusers.AutoencoderKLMochi, latent_channels=4, out_channels=3, encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1, 1, 1, 1, 1), latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    latents = torch.randn(1, 4, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    whole = vae.decode(latents).sample
    decode_in_parts(Namespace(components={"vae": vae}), "vae_tiling")
    assert vae.use_tiling and torch.equal(vae.decode(latents).sample, whole), "too small for tiles"
    vae.use_framewise_decoding = True
    assert not torch.allclose(vae.decode(latents).sample, whole, atol=0.1)


def test_who_cannot_is_named(caplog):
    pipeline = audio.CASES["LongCatAudioDiTPipeline"][0].build()
    for flag, parts in (("vae_slicing", "slices"), ("vae_tiling", "tiles")):
        with pytest.raises(
            ValueError, match=rf"--{flag}: vae \(LongCatAudioDiTVae\) of this LongCatAudioDiTPipeline cannot decode in {parts}.*leave the flag out"
        ):
            decode_in_parts(pipeline, flag)
    with pytest.raises(ValueError, match="--vae_tiling: this pipeline has no autoencoder"):
        decode_in_parts(Namespace(components={"unet": nn.Linear(2, 2)}), "vae_tiling")
    with caplog.at_level(logging.WARNING):
        decode_in_parts(ltx2.CASES["LTX2Pipeline"][0].build(), "vae_tiling")
    assert "--vae_tiling is for vae; audio_vae (AutoencoderKLLTX2Audio) decodes as before." in caplog.text


def test_a_switch_that_nothing_reads_is_no_switch():
    class Deaf(nn.Module):
        def __init__(self):
            super().__init__()
            self.use_tiling = False

        def enable_tiling(self):
            self.use_tiling = True

        def decode(self, z):
            return z

    class Hearing(Deaf):
        def decode(self, z):
            return z / 2 if self.use_tiling else z

    with pytest.raises(ValueError, match=r"vae \(Deaf\)"):
        decode_in_parts(Namespace(components={"vae": Deaf()}), "vae_tiling")
    vae = Hearing()
    decode_in_parts(Namespace(components={"vae": vae}), "vae_tiling")
    assert vae.use_tiling


def test_the_flags_are_those_of_the_loaded_pipeline():
    flags = {"pretrained_model_name_or_path": "mini-sd", "mixed_precision": "no", "revision": None, "variant": None}
    plain = load_pipeline(Namespace(**flags, vae_slicing=False, vae_tiling=False))
    both = load_pipeline(Namespace(**flags, vae_slicing=True, vae_tiling=True))
    assert not plain.vae.use_slicing and not plain.vae.use_tiling and both.vae.use_slicing and both.vae.use_tiling
