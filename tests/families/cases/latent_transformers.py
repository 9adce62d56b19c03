"""Early latent models beside Stable Diffusion: LDM, DiT, PixArt, latent consistency models, Marigold's estimators."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from ..case import Case
from ..parts import (
    LATENT_CHANNELS,
    STABLE_DIFFUSION_BETAS,
    TEXT_WIDTH,
    clip_parts,
    image_vae,
    pictures,
    quiet,
    seeded,
    t5_parts,
    unet,
)  # fmt: skip
from .stable_diffusion import EDIT, GUIDED, SMALL, second_scheduler, stable_diffusion

LINEAR = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
WITHOUT_CLEANING = {"clean_caption": False, "use_resolution_binning": False}


def pixart(cls: type, num_layers: int = 1, **components: Any):
    """Learns its variance beside the noise: twice the channels."""
    transformer = seeded(
        diffusers.PixArtTransformer2DModel, sample_size=8, in_channels=LATENT_CHANNELS, out_channels=2 * LATENT_CHANNELS, num_layers=num_layers,
        num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, caption_channels=TEXT_WIDTH, use_additional_conditions=False,
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler(**LINEAR)
    return quiet(cls(**{"transformer": transformer, "vae": image_vae(), "scheduler": scheduler, **t5_parts(), **components}))


def dit():
    transformer = seeded(
        diffusers.DiTTransformer2DModel, sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2,
        in_channels=LATENT_CHANNELS, out_channels=2 * LATENT_CHANNELS, num_embeds_ada_norm=1000, norm_type="ada_norm_zero",
    )  # fmt: skip
    return quiet(diffusers.DiTPipeline(transformer=transformer, vae=image_vae(), scheduler=diffusers.DDIMScheduler(**LINEAR, clip_sample=False)))


def text_to_image():
    text = clip_parts()
    text["bert"] = text.pop("text_encoder")
    return quiet(diffusers.LDMTextToImagePipeline(vqvae=image_vae(), unet=unet(), scheduler=second_scheduler(), **text))


def vector_quantizer(channels: int = 3) -> diffusers.VQModel:
    return seeded(
        diffusers.VQModel, block_out_channels=[8, 8], norm_num_groups=2, latent_channels=channels, num_vq_embeddings=16,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    )  # fmt: skip


def super_resolution():
    """The low-resolution picture is as large as the latents."""
    denoiser = seeded(
        diffusers.UNet2DModel, sample_size=8, in_channels=6, out_channels=3, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=2,
        attention_head_dim=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return quiet(diffusers.LDMSuperResolutionPipeline(vqvae=vector_quantizer(), unet=denoiser, scheduler=second_scheduler()))


def consistency(cls: type):
    """The guidance scale is an input of the denoiser."""
    scheduler = diffusers.LCMScheduler(**STABLE_DIFFUSION_BETAS, original_inference_steps=50)
    return stable_diffusion(cls, unet=unet(time_cond_proj_dim=16), scheduler=scheduler)


def marigold(cls: type, maps: int = 1, **fields: Any):
    denoiser = unet(in_channels=(1 + maps) * LATENT_CHANNELS, out_channels=maps * LATENT_CHANNELS)
    scheduler = diffusers.DDIMScheduler(
        **STABLE_DIFFUSION_BETAS, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )  # fmt: skip
    return quiet(cls(unet=denoiser, vae=image_vae(), scheduler=scheduler, **clip_parts(), **fields))


INTRINSICS = {"target_names": ["albedo", "material"], "albedo": {"prediction_space": "srgb", "up_to_scale": False}, "material": {
    "prediction_space": "stack", "sub_target_names": ["roughness", "metallicity", None]}}  # fmt: skip
ESTIMATE = {"num_inference_steps": 4, "processing_resolution": 0}
CASES: dict[str, list[Case]] = {
    "PixArtAlphaPipeline": [Case(lambda: pixart(diffusers.PixArtAlphaPipeline), {**SMALL, **WITHOUT_CLEANING})],
    "PixArtSigmaPipeline": [Case(lambda: pixart(diffusers.PixArtSigmaPipeline), {**SMALL, **WITHOUT_CLEANING, "max_sequence_length": 32})],
    "DiTPipeline": [
        Case(dit, GUIDED, {"class_labels": [1, 7]}, prompts=None),
        Case(dit, {**GUIDED, "guidance_scale": 1.0}, {"class_labels": [1, 7]}, prompts=None, variant="without guidance"),
    ],
    "LDMTextToImagePipeline": [Case(text_to_image, {**SMALL, "height": 64, "width": 64}, remark="latents of an eighth of the size, whatever the autoencoder")],
    "LDMSuperResolutionPipeline": [Case(super_resolution, {"num_inference_steps": 4}, {"image": torch.cat(pictures(8))}, prompts=None)],
    "LatentConsistencyModelPipeline": [Case(lambda: consistency(diffusers.LatentConsistencyModelPipeline), SMALL)],
    "LatentConsistencyModelImg2ImgPipeline": [
        Case(lambda: consistency(diffusers.LatentConsistencyModelImg2ImgPipeline), EDIT, {"image": pictures()}),
    ],
    "MarigoldDepthPipeline": [
        Case(lambda: marigold(diffusers.MarigoldDepthPipeline, prediction_type="depth"), ESTIMATE, {"image": pictures()}, prompts=None),
    ],
    "MarigoldNormalsPipeline": [
        Case(lambda: marigold(diffusers.MarigoldNormalsPipeline, prediction_type="normals"), ESTIMATE, {"image": pictures()}, prompts=None),
    ],
    "MarigoldIntrinsicsPipeline": [
        Case(
            lambda: marigold(diffusers.MarigoldIntrinsicsPipeline, 2, prediction_type="intrinsics", target_properties=INTRINSICS),
            ESTIMATE,
            {"image": pictures()},
            prompts=None,
        )
    ],
}  # fmt: skip

ABSENT: dict[str, str] = {}
