"""LTX-Video: text, pictures and videos to videos, several prompts in one long video, latents made larger."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.pipelines.ltx.modeling_latent_upsampler import LTXLatentUpsamplerModel

from ..case import Case
from ..parts import TEXT_WIDTH, photograph, seeded, shifted_flow, t5_parts
from ..video_parts import two_pictures

VIDEO = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 4, "guidance_scale": 3.0, "max_sequence_length": 32}


def ltx_vae() -> torch.nn.Module:
    sides = {f"{side}{name}": value for side in ("", "decoder_") for name, value in {
        "block_out_channels": (8, 8), "layers_per_block": (1, 1, 1), "spatio_temporal_scaling": (True, True),
    }.items()}  # fmt: skip
    return seeded(
        diffusers.AutoencoderKLLTXVideo, latent_channels=8, down_block_types=["LTXVideoDownBlock3D"] * 2, patch_size=1,
        decoder_inject_noise=(False,) * 3, **sides,
    )  # fmt: skip


def ltx(cls: type = diffusers.LTXPipeline, **components: Any):
    transformer = seeded(
        diffusers.LTXVideoTransformer3DModel, in_channels=8, out_channels=8, num_layers=1, num_attention_heads=2, attention_head_dim=16,
        cross_attention_dim=32, caption_channels=TEXT_WIDTH,
    )  # fmt: skip
    scheduler = shifted_flow(use_dynamic_shifting=True)
    return cls(**{"transformer": transformer, "vae": ltx_vae(), "scheduler": scheduler, **t5_parts(), **components})


def upsample():
    upsampler = seeded(LTXLatentUpsamplerModel, in_channels=8, mid_channels=32, num_blocks_per_stage=1)
    return diffusers.LTXLatentUpsamplePipeline(vae=ltx_vae(), latent_upsampler=upsampler)


def long_video():
    return ltx(diffusers.LTXI2VLongMultiPromptPipeline, scheduler=diffusers.LTXEulerAncestralRFScheduler())


LONG = {**VIDEO, "num_frames": 9, "temporal_tile_size": 8, "temporal_overlap": 4, "seed": None}

CASES: dict[str, list[Case]] = {
    "LTXPipeline": [Case(ltx, VIDEO)],
    "LTXImageToVideoPipeline": [Case(lambda: ltx(diffusers.LTXImageToVideoPipeline), VIDEO, {"image": two_pictures(32)})],
    "LTXConditionPipeline": [
        Case(lambda: ltx(diffusers.LTXConditionPipeline, scheduler=shifted_flow(shift=1.0, shift_terminal=0.1)), {**VIDEO, "image": photograph(32)})
    ],
    "LTXI2VLongMultiPromptPipeline": [Case(long_video, LONG, one_sample=True, remark="several prompts are the parts of one video")],
    "LTXLatentUpsamplePipeline": [Case(upsample, {"height": 16, "width": 16, "video": photograph(16).repeat(5, 1, 1, 1)}, prompts=None, one_sample=True)],
}

ABSENT: dict[str, str] = {}
