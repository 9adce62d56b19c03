"""Kandinsky 5: pictures and videos by one transformer; Kandinsky 6: with sound, and enlarged."""

from __future__ import annotations

from typing import Any

import diffusers

from ..case import Case
from ..parts import CLIP_WIDTH, LATENT_CHANNELS, TEXT_WIDTH, clip_parts, image_vae, seeded, shifted_flow
from ..video_parts import picture, two_pictures
from ..vision_language import qwen_vl, qwen_vl_processor
from .hunyuan_video import video_vae

# Templates are long in bytes, and what lies beyond this length is cut off, prompts first.
PICTURE = {"height": 32, "width": 32, "num_inference_steps": 4, "guidance_scale": 3.0, "max_sequence_length": 900}
VIDEO = {**PICTURE, "num_frames": 5}


def text_parts() -> dict[str, Any]:
    processor = qwen_vl_processor()
    return {"tokenizer": processor, "text_encoder": qwen_vl(processor), **clip_parts("_2")}


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


def picture_vae() -> diffusers.AutoencoderKL:
    return image_vae(levels=4, scaling_factor=0.3611, shift_factor=0.1159)


CASES: dict[str, list[Case]] = {
    "Kandinsky5T2IPipeline": [Case(lambda: kandinsky(diffusers.Kandinsky5T2IPipeline, picture_vae(), False, 32), PICTURE)],
    "Kandinsky5I2IPipeline": [
        Case(lambda: kandinsky(diffusers.Kandinsky5I2IPipeline, picture_vae(), True, 32), {**PICTURE, "image": picture(32)}, one_sample=True)
    ],
    "Kandinsky5T2VPipeline": [Case(lambda: kandinsky(diffusers.Kandinsky5T2VPipeline, video_vae(), False), VIDEO)],
    "Kandinsky5I2VPipeline": [Case(lambda: kandinsky(diffusers.Kandinsky5I2VPipeline, video_vae(), True), VIDEO, {"image": two_pictures(32)})],
}

ABSENT: dict[str, str] = {}
