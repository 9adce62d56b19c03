"""Videos by Stable Diffusion's networks: AnimateDiff, Stable Video Diffusion, and earlier ones."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from ..case import Case
from ..parts import (
    CLIP_WIDTH,
    LATENT_CHANNELS,
    STABLE_DIFFUSION_BETAS,
    clip_parts,
    image_vae,
    picture_encoder,
    picture_processor,
    pictures,
    quiet,
    seeded,
    unet,
)  # fmt: skip
from .controlnet import control_net
from .stable_diffusion import GUIDED, SMALL, second_scheduler
from .stable_diffusion_xl import xl_parts

FRAMES = {"num_frames": 2}
MOTION = {"block_out_channels": (8, 16), "motion_layers_per_block": 1, "motion_norm_num_groups": 2, "motion_num_attention_heads": 2}


def motion_scheduler() -> diffusers.DDIMScheduler:
    return second_scheduler(beta_schedule="linear", set_alpha_to_one=True, steps_offset=1)


def animated(cls: type, **components: Any):
    parts = {"unet": unet(), "vae": image_vae(), "scheduler": motion_scheduler(), "motion_adapter": seeded(diffusers.MotionAdapter, **MOTION), **clip_parts()}
    return quiet(cls(**{**parts, **components}))


def animated_xl():
    adapter = seeded(diffusers.MotionAdapter, **MOTION, use_motion_mid_block=False)
    parts = {**xl_parts(), "scheduler": motion_scheduler(), "motion_adapter": adapter}
    return quiet(diffusers.AnimateDiffSDXLPipeline(**parts))


def sparsely_controlled():
    net = seeded(
        diffusers.SparseControlNetModel, in_channels=LATENT_CHANNELS, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=2,
        down_block_types=("DownBlockMotion", "CrossAttnDownBlockMotion"), cross_attention_dim=CLIP_WIDTH, attention_head_dim=2,
        conditioning_embedding_out_channels=(8, 16), use_simplified_condition_embedding=False, conditioning_channels=3,
    )  # fmt: skip
    return animated(diffusers.AnimateDiffSparseControlNetPipeline, controlnet=net)


def stable_video():
    denoiser = seeded(
        diffusers.UNetSpatioTemporalConditionModel, sample_size=8, block_out_channels=(32, 64), layers_per_block=1, in_channels=2 * LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS, down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), cross_attention_dim=CLIP_WIDTH, num_attention_heads=(2, 2),
        projection_class_embeddings_input_dim=24, addition_time_embed_dim=8, num_frames=2,
    )  # fmt: skip
    scheduler = diffusers.EulerDiscreteScheduler(
        **STABLE_DIFFUSION_BETAS, prediction_type="v_prediction", sigma_max=700.0, sigma_min=0.002, steps_offset=1, timestep_spacing="leading",
        timestep_type="continuous", use_karras_sigmas=True,
    )  # fmt: skip
    vae = seeded(diffusers.AutoencoderKLTemporalDecoder, block_out_channels=[32, 32], down_block_types=["DownEncoderBlock2D"] * 2)
    parts = {"image_encoder": picture_encoder(), "feature_extractor": picture_processor()}
    return quiet(diffusers.StableVideoDiffusionPipeline(unet=denoiser, vae=vae, scheduler=scheduler, **parts))


def image_to_video_xl():
    denoiser = seeded(
        diffusers.I2VGenXLUNet, sample_size=8, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, block_out_channels=(8, 16), layers_per_block=1,
        norm_num_groups=2, cross_attention_dim=CLIP_WIDTH, attention_head_dim=4, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )  # fmt: skip
    parts = {"image_encoder": picture_encoder(), "feature_extractor": picture_processor(), **clip_parts()}
    return quiet(diffusers.I2VGenXLPipeline(unet=denoiser, vae=image_vae(), scheduler=second_scheduler(), **parts))


def text_to_video(cls: type):
    denoiser = seeded(
        diffusers.UNet3DConditionModel, sample_size=8, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, block_out_channels=(8, 16),
        layers_per_block=1, norm_num_groups=2, cross_attention_dim=CLIP_WIDTH, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )  # fmt: skip
    return quiet(cls(unet=denoiser, vae=image_vae(), scheduler=second_scheduler(), **clip_parts()))


def personalized():
    """The first picture and a mask are joined to the latents."""
    return animated(diffusers.PIAPipeline, motion_adapter=seeded(diffusers.MotionAdapter, **MOTION, conv_in_channels=2 * LATENT_CHANNELS + 1))


def _videos() -> list[list[torch.Tensor]]:
    """Two videos of two frames (3, 16, 16)."""
    first, second = (picture[0] for picture in pictures())
    return [[first, second], [second, first]]


VIDEO, CONTROL = {"video": _videos()}, {"conditioning_frames": _videos()}
SHORT = {**SMALL, **FRAMES}
FRAMES_AS_SAMPLES = "Each step takes the frames of one video as samples. Given a list of generators the stock call encodes as many frames as there are."

CASES: dict[str, list[Case]] = {
    "AnimateDiffPipeline": [Case(lambda: animated(diffusers.AnimateDiffPipeline), SHORT)],
    "AnimateDiffPAGPipeline": [Case(lambda: animated(diffusers.AnimateDiffPAGPipeline, pag_applied_layers=["mid.*attn1"]), {**SHORT, "pag_scale": 2.0})],
    "AnimateDiffSDXLPipeline": [Case(animated_xl, SHORT)],
    "AnimateDiffControlNetPipeline": [
        Case(
            lambda: animated(diffusers.AnimateDiffControlNetPipeline, controlnet=control_net()),
            {**SHORT, "conditioning_frames": pictures()},
            one_sample=True,
            remark="the frames that control are those of one video",
        )
    ],
    "AnimateDiffSparseControlNetPipeline": [
        Case(
            sparsely_controlled,
            {**SHORT, "conditioning_frames": pictures(), "controlnet_frame_indices": [0, 1]},
            remark="all samples share the frames that control",
        )
    ],
    "AnimateDiffVideoToVideoPipeline": [Case(lambda: animated(diffusers.AnimateDiffVideoToVideoPipeline), SMALL, VIDEO)],
    "AnimateDiffVideoToVideoControlNetPipeline": [
        Case(lambda: animated(diffusers.AnimateDiffVideoToVideoControlNetPipeline, controlnet=control_net()), SMALL, {**VIDEO, **CONTROL}),
    ],
    "StableVideoDiffusionPipeline": [
        Case(
            stable_video,
            {"height": 16, "width": 16, **FRAMES, "num_inference_steps": 4, "max_guidance_scale": 3.0},
            {"image": torch.cat(pictures())},
            prompts=None,
        )
    ],
    "I2VGenXLPipeline": [Case(image_to_video_xl, {**SHORT, "clip_skip": None}, {"image": pictures()})],
    "TextToVideoSDPipeline": [Case(lambda: text_to_video(diffusers.TextToVideoSDPipeline), SHORT)],
    "VideoToVideoSDPipeline": [
        Case(lambda: text_to_video(diffusers.VideoToVideoSDPipeline), {**GUIDED, "strength": 0.8}, VIDEO, one_sample=True, remark=FRAMES_AS_SAMPLES)
    ],
    "PIAPipeline": [Case(personalized, SHORT, {"image": pictures()})],
}

ABSENT: dict[str, str] = {}
