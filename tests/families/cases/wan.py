"""Wan 2.1 and 2.2: text, pictures and videos to videos, characters set in motion; and ChronoEdit, LucyEdit and AnyFlow, which are built on it."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from ..case import Case
from ..parts import LATENT_CHANNELS, causal_vae, seeded, t5_parts
from ..video_parts import TRANSFORMER, VISION_WIDTH, clip_of_pictures, clip_vision_parts, multistep_flow, picture, two_clips, wan_transformer

SIZED = {"height": 16, "width": 16, "num_inference_steps": 4, "guidance_scale": 3.0, "max_sequence_length": 32}
VIDEO = {**SIZED, "num_frames": 5}
# Latents, the picture's latents, and a mask of four frames.
CONDITIONED = 2 * LATENT_CHANNELS + 4
PYRAMID = {"height": 32, "width": 32, "num_frames": 5, "guidance_scale": 3.0, "max_sequence_length": 32, "pyramid_num_inference_steps_list": [2, 2, 2]}
TWO = {"boundary_ratio": 0.875}


def wan_vae(cls: type = diffusers.AutoencoderKLWan, **config: Any) -> torch.nn.Module:
    return causal_vae(cls, **{"scale_factor_spatial": 4, **config})


def larger_vae() -> diffusers.AutoencoderKLWan:
    """Of Wan 2.2's small model: it patchifies pictures, and a shortcut passes each block by."""
    statistics = {"latents_mean": [0.1] * 8, "latents_std": [1.5] * 8}
    return wan_vae(in_channels=12, out_channels=12, is_residual=True, patch_size=2, scale_factor_spatial=8, scale_factor_temporal=4, z_dim=8, **statistics)


def wan(cls: type = diffusers.WanPipeline, **components: Any):
    return cls(**{"transformer": wan_transformer(), "vae": wan_vae(), "scheduler": multistep_flow(), **t5_parts(), **components})


def two_transformers(cls: type = diffusers.WanPipeline, **config: Any):
    return wan(cls, transformer=wan_transformer(**config), transformer_2=wan_transformer(num_layers=2, **config), **TWO)


def small_model(cls: type = diffusers.WanPipeline):
    """Wan 2.2 with 5 billion weights: a time for each token."""
    denoiser = wan_transformer(in_channels=8, out_channels=8)
    return wan(cls, transformer=denoiser, vae=larger_vae(), expand_timesteps=True)


def from_pictures(cls: type = diffusers.WanImageToVideoPipeline, **config: Any):
    denoiser = wan_transformer(in_channels=CONDITIONED, image_dim=VISION_WIDTH, **config)
    return wan(cls, transformer=denoiser, **clip_vision_parts())


def vace():
    denoiser = wan_transformer(
        diffusers.WanVACETransformer3DModel, num_layers=2, vace_layers=[0], vace_in_channels=2 * LATENT_CHANNELS + 16
    )  # fmt: skip
    return wan(diffusers.WanVACEPipeline, transformer=denoiser)


def animate():
    denoiser = wan_transformer(
        diffusers.WanAnimateTransformer3DModel, num_layers=2, in_channels=CONDITIONED, latent_channels=LATENT_CHANNELS, image_dim=VISION_WIDTH,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8}, motion_encoder_size=16, motion_style_dim=8, motion_dim=4, motion_encoder_dim=8,
        face_encoder_hidden_dim=8, face_encoder_num_heads=2, inject_face_latents_blocks=2,
    )  # fmt: skip
    return wan(diffusers.WanAnimatePipeline, transformer=denoiser, **clip_vision_parts())


def anyflow(cls: type = diffusers.AnyFlowPipeline, denoiser: type = diffusers.AnyFlowTransformer3DModel, **config: Any):
    """Its model is told where a step starts and where it ends."""
    scheduler = diffusers.FlowMapEulerDiscreteScheduler(num_train_timesteps=1000, shift=5.0)
    return wan(cls, transformer=wan_transformer(denoiser, gate_value=0.25, deltatime_type="r", **config), scheduler=scheduler)


def anyflow_far():
    chunks = {"compressed_patch_size": (1, 4, 4), "full_chunk_limit": 3, "chunk_partition": (1, 1)}
    return anyflow(diffusers.AnyFlowFARPipeline, diffusers.AnyFlowFARTransformer3DModel, **chunks)


def chronoedit():
    denoiser = wan_transformer(diffusers.ChronoEditTransformer3DModel, in_channels=CONDITIONED, image_dim=VISION_WIDTH)
    return wan(diffusers.ChronoEditPipeline, transformer=denoiser, **clip_vision_parts())


def helios(cls: type, scheduler: diffusers.HeliosScheduler):
    denoiser = seeded(
        diffusers.HeliosTransformer3DModel, **TRANSFORMER, rope_dim=(4, 4, 4), has_multi_term_memory_patch=True, guidance_cross_attn=True,
        zero_history_timestep=True,
    )  # fmt: skip
    return wan(cls, transformer=denoiser, scheduler=scheduler)


CASES: dict[str, list[Case]] = {
    "WanPipeline": [
        Case(wan, VIDEO, variant="2.1"),
        Case(two_transformers, VIDEO, variant="2.2"),
        Case(small_model, VIDEO, variant="2.2-5B"),
    ],
    "WanImageToVideoPipeline": [
        Case(from_pictures, {**VIDEO, "image": picture()}, variant="2.1"),
        Case(
            lambda: from_pictures(pos_embed_seq_len=2 * (4 * 4 + 1)),
            {**VIDEO, "image": picture(), "last_image": picture(flipped=True)},
            variant="first and last frame",
        ),
        Case(lambda: two_transformers(diffusers.WanImageToVideoPipeline, in_channels=CONDITIONED), {**VIDEO, "image": picture()}, variant="2.2"),
        Case(lambda: small_model(diffusers.WanImageToVideoPipeline), {**VIDEO, "image": picture()}, variant="2.2-5B"),
    ],
    "WanVideoToVideoPipeline": [
        Case(
            lambda: wan(diffusers.WanVideoToVideoPipeline),
            {**SIZED, "strength": 0.8, "num_inference_steps": 5},
            {"video": two_clips(5)},
        )
    ],
    "WanVACEPipeline": [Case(vace, {**VIDEO, "video": clip_of_pictures(5), "mask": [picture().convert("L")] * 5}, one_sample=True)],
    "WanAnimatePipeline": [
        Case(
            animate,
            {
                **SIZED, "segment_frame_length": 5, "prev_segment_conditioning_frames": 1, "image": picture(), "pose_video": clip_of_pictures(5),
                "face_video": clip_of_pictures(5, flipped=True),
            },
        )
    ],
    "ChronoEditPipeline": [Case(chronoedit, {**VIDEO, "image": picture()})],
    "LucyEditPipeline": [
        Case(lambda: wan(diffusers.LucyEditPipeline, transformer=wan_transformer(in_channels=2 * LATENT_CHANNELS)), VIDEO, {"video": two_clips(5)})
    ],
    "AnyFlowPipeline": [Case(anyflow, VIDEO)],
    "AnyFlowFARPipeline": [Case(anyflow_far, VIDEO)],
    "HeliosPipeline": [
        Case(lambda: helios(diffusers.HeliosPipeline, diffusers.HeliosScheduler(stage_range=[0, 1], stages=1, use_dynamic_shifting=True)), VIDEO)
    ],
    "HeliosPyramidPipeline": [Case(lambda: helios(diffusers.HeliosPyramidPipeline, diffusers.HeliosScheduler(use_dynamic_shifting=True, gamma=0.33)), PYRAMID)],
}  # fmt: skip

ABSENT: dict[str, str] = {}
