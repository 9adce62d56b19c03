"""CogVideoX: velocities of a noise schedule that ends without signal; Mochi, Allegro and Latte."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from ..case import Case
from ..parts import LATENT_CHANNELS, TEXT_WIDTH, image_vae, seeded, t5_parts
from ..video_parts import two_clips, two_pictures

SIZED = {"height": 16, "width": 16, "num_inference_steps": 4, "guidance_scale": 3.0, "max_sequence_length": 32}
VIDEO = {**SIZED, "num_frames": 5}
TRANSFORMER = {
    "in_channels": LATENT_CHANNELS, "out_channels": LATENT_CHANNELS, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16,
    "time_embed_dim": 8, "text_embed_dim": TEXT_WIDTH, "sample_width": 8, "sample_height": 8, "sample_frames": 5, "temporal_compression_ratio": 2,
    "max_text_seq_length": 32,
}  # fmt: skip
ROTARY = {"use_rotary_positional_embeddings": True, "use_learned_positional_embeddings": True}
PICTURE = {"in_channels": 2 * LATENT_CHANNELS, **ROTARY}


def video_vae(cls: type = diffusers.AutoencoderKLCogVideoX, block: str = "CogVideoX", levels: int = 2, **config: Any) -> torch.nn.Module:
    return seeded(
        cls, down_block_types=[f"{block}DownBlock3D"] * levels, up_block_types=[f"{block}UpBlock3D"] * levels, block_out_channels=(8,) * levels,
        latent_channels=LATENT_CHANNELS, layers_per_block=1, norm_num_groups=2, **{"temporal_compression_ratio": 2, **config},
    )  # fmt: skip


def cogvideox(cls: type = diffusers.CogVideoXPipeline, **config: Any):
    """Predicts the velocity of a noise schedule that ends without signal."""
    transformer = seeded(diffusers.CogVideoXTransformer3DModel, **{**TRANSFORMER, **config})
    scheduler = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=1.0, set_alpha_to_one=True, timestep_spacing="trailing"
    )
    return cls(transformer=transformer, vae=video_vae(), scheduler=scheduler, **t5_parts())


def mochi():
    transformer = seeded(
        diffusers.MochiTransformer3DModel, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16, in_channels=12,
        text_embed_dim=TEXT_WIDTH, time_embed_dim=4, max_sequence_length=32,
    )  # fmt: skip
    vae = seeded(diffusers.AutoencoderKLMochi, encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4, layers_per_block=(1,) * 5)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    return diffusers.MochiPipeline(transformer=transformer, vae=vae, scheduler=scheduler, **t5_parts())


def allegro():
    transformer = seeded(
        diffusers.AllegroTransformer3DModel, num_attention_heads=2, attention_head_dim=12, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS,
        num_layers=1, cross_attention_dim=24, sample_width=8, sample_height=8, sample_frames=8, caption_channels=TEXT_WIDTH,
    )  # fmt: skip
    vae = video_vae(diffusers.AutoencoderKLAllegro, "Allegro", levels=4, temporal_compression_ratio=4)
    vae.enable_tiling()  # diffusers has no other way to decode; tiles are as large as the video here
    vae.kernel = vae.stride = (8, 16, 16)
    scheduler = diffusers.EulerAncestralDiscreteScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02)
    return diffusers.AllegroPipeline(transformer=transformer, vae=vae, scheduler=scheduler, **t5_parts())


def latte():
    transformer = seeded(
        diffusers.LatteTransformer3DModel, sample_size=8, video_length=2, num_layers=1, patch_size=2, num_attention_heads=2, attention_head_dim=12,
        caption_channels=TEXT_WIDTH, in_channels=LATENT_CHANNELS, out_channels=2 * LATENT_CHANNELS, cross_attention_dim=24, attention_bias=True,
        activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02, clip_sample=False)
    return diffusers.LattePipeline(transformer=transformer, vae=image_vae(), scheduler=scheduler, **t5_parts())


LATTE = {"height": 16, "width": 16, "num_inference_steps": 4, "guidance_scale": 3.0, "video_length": 2, "clean_caption": False}

CASES: dict[str, list[Case]] = {
    "CogVideoXPipeline": [Case(cogvideox, VIDEO)],
    "CogVideoXImageToVideoPipeline": [Case(lambda: cogvideox(diffusers.CogVideoXImageToVideoPipeline, **PICTURE), VIDEO, {"image": two_pictures()})],
    "CogVideoXVideoToVideoPipeline": [
        Case(
            lambda: cogvideox(diffusers.CogVideoXVideoToVideoPipeline),
            {**SIZED, "strength": 0.8, "num_inference_steps": 5},
            {"video": two_clips(5)},
        )
    ],
    "CogVideoXFunControlPipeline": [
        Case(
            lambda: cogvideox(diffusers.CogVideoXFunControlPipeline, in_channels=2 * LATENT_CHANNELS),
            SIZED,
            {"control_video": two_clips(5)},
        )
    ],
    "MochiPipeline": [Case(mochi, {**VIDEO, "num_frames": 7})],
    "AllegroPipeline": [
        Case(allegro, {**VIDEO, "num_frames": 8, "clean_caption": False}, one_sample=True, remark="its autoencoder decodes one video at a time")
    ],
    "LattePipeline": [Case(latte, LATTE)],
}

ABSENT: dict[str, str] = {"ConsisIDPipeline": "its pipeline needs OpenCV, with which it draws points on faces"}
