"""Kandinsky 5: pictures and videos by one transformer; Kandinsky 6: with sound, and enlarged."""

from __future__ import annotations

from typing import Any

import diffusers

from ..case import Case
from ..parts import CLIP_WIDTH, LATENT_CHANNELS, TEXT_WIDTH, clip_parts, image_vae, seeded, shifted_flow
from ..video_parts import clip_of_pictures, picture, two_pictures
from ..vision_language import qwen2_5_vl, vision_processor
from .hunyuan_video import video_vae

# Templates are long in bytes, and what lies beyond this length is cut off, prompts first.
PICTURE = {"height": 32, "width": 32, "num_inference_steps": 4, "guidance_scale": 3.0, "max_sequence_length": 900}
VIDEO = {**PICTURE, "num_frames": 5}
# The first four latent frames are brought to the mean of those after them: there must be some.
CONTINUED = {**PICTURE, "num_frames": 21}


def text_parts() -> dict[str, Any]:
    return {"tokenizer": vision_processor(), "text_encoder": qwen2_5_vl(), **clip_parts("_2")}


def kandinsky(cls: type, vae: Any, visual_cond: bool, size: int | None = None):
    transformer = seeded(
        diffusers.Kandinsky5Transformer3DModel, in_visual_dim=LATENT_CHANNELS, out_visual_dim=LATENT_CHANNELS, in_text_dim=TEXT_WIDTH,
        in_text_dim2=CLIP_WIDTH, time_dim=16, model_dim=16, ff_dim=32, num_text_blocks=1, num_visual_blocks=1, axes_dims=(1, 1, 2),
        visual_cond=visual_cond, attention_type="regular",
    )  # fmt: skip
    pipeline = cls(transformer=transformer, vae=vae, scheduler=shifted_flow(shift=5.0), **text_parts())
    if size is not None:
        pipeline.resolutions = [(size, size)]  # it makes pictures of about a million pixels only
    return pipeline


def with_sound():
    transformer = seeded(
        diffusers.Kandinsky6Transformer3DModel, in_visual_dim=LATENT_CHANNELS, out_visual_dim=LATENT_CHANNELS, in_text_dim=TEXT_WIDTH,
        in_text_dim2=CLIP_WIDTH, time_dim=16, model_dim=16, ff_dim=32, num_text_blocks=1, num_visual_blocks=1, axes_dims=(4, 2, 2), in_audio_dim=4,
        out_audio_dim=4,
    )  # fmt: skip
    audio_vae = seeded(
        diffusers.MMAudioVAE, mel_bins=8, latent_channels=4, hidden_channels=16, channel_multipliers=(1, 2), layers_per_block=1, sample_rate=1600,
        n_fft=64, hop_length=16,
    )  # fmt: skip
    vocoder = seeded(
        diffusers.MMAudioVocoder, num_mels=8, upsample_initial_channel=16, upsample_rates=(4, 4), upsample_kernel_sizes=(8, 8),
        resblock_kernel_sizes=(3,), resblock_dilation_sizes=((1, 3),),
    )  # fmt: skip
    return diffusers.Kandinsky6TI2VAPipeline(
        transformer=transformer, vae=video_vae(), scheduler=shifted_flow(shift=5.0), audio_vae=audio_vae, vocoder=vocoder, **text_parts()
    )


def enlarged(outputs: int, scheduler: Any):
    transformer = seeded(
        diffusers.Kandinsky6SRTransformer3DModel, in_visual_dim=LATENT_CHANNELS, out_visual_dim=outputs * LATENT_CHANNELS, time_dim=16, model_dim=16,
        ff_dim=32, num_visual_blocks=1, axes_dims=(4, 2, 2), tile_sizes=((128, 128),),
    )  # fmt: skip
    vae = seeded(
        diffusers.Kandinsky6SRVAE, latent_channels=LATENT_CHANNELS, encoder_block_out_channels=(8,) * 5, decoder_block_out_channels=(8,) * 5,
        layers_per_block=1,
    )  # fmt: skip
    return diffusers.Kandinsky6SRPipeline(transformer=transformer, vae=vae, scheduler=scheduler)


def picture_vae() -> diffusers.AutoencoderKL:
    return image_vae(levels=4, scaling_factor=0.3611, shift_factor=0.1159)


ENLARGED = {"prompts": None, "one_sample": True}

CASES: dict[str, list[Case]] = {
    "Kandinsky5T2IPipeline": [Case(lambda: kandinsky(diffusers.Kandinsky5T2IPipeline, picture_vae(), False, 32), PICTURE)],
    "Kandinsky5I2IPipeline": [
        Case(lambda: kandinsky(diffusers.Kandinsky5I2IPipeline, picture_vae(), True, 32), {**PICTURE, "image": picture(32)}, one_sample=True)
    ],
    "Kandinsky5T2VPipeline": [Case(lambda: kandinsky(diffusers.Kandinsky5T2VPipeline, video_vae(), False), VIDEO)],
    "Kandinsky5I2VPipeline": [Case(lambda: kandinsky(diffusers.Kandinsky5I2VPipeline, video_vae(), True), CONTINUED, {"image": two_pictures(32)})],
    "Kandinsky6TI2VAPipeline": [Case(with_sound, {**VIDEO, "frame_rate": 24.0})],
    "Kandinsky6SRPipeline": [
        Case(
            lambda: enlarged(10, diffusers.PiflowScheduler()),
            {"video": clip_of_pictures(5, 64), "num_inference_steps": 4, "resolution_scale": 2},
            variant="as published",
            **ENLARGED,
        ),
        Case(
            lambda: enlarged(1, shifted_flow()),
            {"video": clip_of_pictures(5, 64), "num_inference_steps": 4, "resolution_scale": 2},
            variant="a flow",
            **ENLARGED,
        ),
    ],
}

ABSENT: dict[str, str] = {}
