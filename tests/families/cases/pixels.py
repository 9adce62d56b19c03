"""Models of pixels, most of them without text: DDPM and DDIM, PNDM, RePaint, score models, consistency models, DeepFloyd IF; latent and sound ones too."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from ..case import Case
from ..parts import LATENT_CHANNELS, TEXT_WIDTH, photograph, seeded, t5_parts, unet

STEPS = {"num_inference_steps": 4}


def pixel_unet(channels: int = 3, size: int = 8, **config: Any) -> diffusers.UNet2DModel:
    return seeded(
        diffusers.UNet2DModel, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, sample_size=size, in_channels=channels,
        out_channels=channels, down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=4,
        **config,
    )  # fmt: skip


def unconditional(cls: type, scheduler: Any):
    return cls(unet=pixel_unet(), scheduler=scheduler)


def latent_unconditional():
    vqvae = seeded(
        diffusers.VQModel, block_out_channels=[8, 8], down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=LATENT_CHANNELS, norm_num_groups=2, num_vq_embeddings=12,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False)
    return diffusers.LDMPipeline(unet=pixel_unet(LATENT_CHANNELS), vqvae=vqvae, scheduler=scheduler)


def dance_diffusion():
    denoiser = seeded(
        diffusers.UNet1DModel, block_out_channels=(32, 32, 64), extra_in_channels=64, sample_size=512, sample_rate=16000, in_channels=2, out_channels=2,
        flip_sin_to_cos=True, use_timestep_embedding=False, time_embedding_type="fourier", mid_block_type="UNetMidBlock1D",
        down_block_types=("DownBlock1DNoSkip", "DownBlock1D", "AttnDownBlock1D"), up_block_types=("AttnUpBlock1D", "UpBlock1D", "UpBlock1DNoSkip"),
    )  # fmt: skip
    return diffusers.DanceDiffusionPipeline(unet=denoiser, scheduler=diffusers.IPNDMScheduler())


def consistency():
    scheduler = diffusers.CMStochasticIterativeScheduler(num_train_timesteps=40, sigma_min=0.002, sigma_max=80.0)
    return unconditional(diffusers.ConsistencyModelPipeline, scheduler)


# --- DeepFloyd IF ------------------------------------------------------------------------------------------------------


def deepfloyd(cls: type, second: bool = False):
    """It learns its variance: twice the channels."""
    sized = {"class_embed_type": "timestep", "mid_block_scale_factor": 1.414, "time_embedding_act_fn": "gelu"} if second else {}
    denoiser = unet(
        sample_size=16, block_out_channels=(16, 32), down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        in_channels=6 if second else 3, out_channels=6, cross_attention_dim=32, encoder_hid_dim=TEXT_WIDTH, attention_head_dim=8,
        addition_embed_type="text", addition_embed_type_num_heads=2, cross_attention_norm="group_norm", resnet_time_scale_shift="scale_shift",
        act_fn="gelu", norm_num_groups=4, **sized,
    )  # fmt: skip
    scheduler = diffusers.DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", thresholding=True, dynamic_thresholding_ratio=0.95, sample_max_value=1.0, variance_type="learned_range"
    )
    parts = {"unet": denoiser, "scheduler": scheduler, "watermarker": None, "safety_checker": None, "feature_extractor": None, **t5_parts()}
    if second:
        parts["image_noising_scheduler"] = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    return cls(**parts, requires_safety_checker=False)


def pictures(size: int) -> torch.Tensor:
    """(2, 3, size, size) in [-1, 1]."""
    values = photograph(size) * 2 - 1
    return torch.cat([values, values.flip(-1)])


IF = {"num_inference_steps": 4, "guidance_scale": 3.0, "clean_caption": False}
FIRST = {**IF, "height": 16, "width": 16}
MASKS = (pictures(16)[:, :1] > 0).float()
AGAIN = {"strength": 0.8, "num_inference_steps": 5}

CASES: dict[str, list[Case]] = {
    "DDPMPipeline": [Case(lambda: unconditional(diffusers.DDPMPipeline, diffusers.DDPMScheduler()), STEPS, prompts=None)],
    "DDIMPipeline": [Case(lambda: unconditional(diffusers.DDIMPipeline, diffusers.DDIMScheduler()), STEPS, prompts=None)],
    "PNDMPipeline": [Case(lambda: unconditional(diffusers.PNDMPipeline, diffusers.PNDMScheduler()), {"num_inference_steps": 8}, prompts=None)],
    "RePaintPipeline": [
        Case(
            lambda: unconditional(diffusers.RePaintPipeline, diffusers.RePaintScheduler()),
            {"num_inference_steps": 6, "jump_length": 2, "jump_n_sample": 2},
            {"image": pictures(8), "mask_image": MASKS[..., ::2, ::2]},
            prompts=None,
        )
    ],
    "ScoreSdeVePipeline": [Case(lambda: unconditional(diffusers.ScoreSdeVePipeline, diffusers.ScoreSdeVeScheduler()), STEPS, prompts=None)],
    "KarrasVePipeline": [Case(lambda: unconditional(diffusers.KarrasVePipeline, diffusers.KarrasVeScheduler()), STEPS, prompts=None)],
    "LDMPipeline": [Case(latent_unconditional, STEPS, prompts=None)],
    "DanceDiffusionPipeline": [Case(dance_diffusion, {**STEPS, "audio_length_in_s": 0.032}, prompts=None)],
    "ConsistencyModelPipeline": [Case(consistency, {"num_inference_steps": None, "timesteps": [22, 0]}, prompts=None)],
    "IFPipeline": [Case(lambda: deepfloyd(diffusers.IFPipeline), FIRST)],
    "IFImg2ImgPipeline": [Case(lambda: deepfloyd(diffusers.IFImg2ImgPipeline), {**IF, **AGAIN}, {"image": pictures(16)})],
    "IFInpaintingPipeline": [Case(lambda: deepfloyd(diffusers.IFInpaintingPipeline), {**IF, **AGAIN}, {"image": pictures(16), "mask_image": MASKS})],
    "IFSuperResolutionPipeline": [Case(lambda: deepfloyd(diffusers.IFSuperResolutionPipeline, True), FIRST, {"image": pictures(8)})],
    "IFImg2ImgSuperResolutionPipeline": [
        Case(
            lambda: deepfloyd(diffusers.IFImg2ImgSuperResolutionPipeline, True),
            {**IF, **AGAIN},
            {"image": pictures(8), "original_image": pictures(16)},
        )
    ],
    "IFInpaintingSuperResolutionPipeline": [
        Case(
            lambda: deepfloyd(diffusers.IFInpaintingSuperResolutionPipeline, True),
            {**IF, **AGAIN},
            {"image": pictures(8), "original_image": pictures(16), "mask_image": MASKS},
        )
    ],
}

ABSENT: dict[str, str] = {}
