"""Modular pipelines of videos: Wan 2.1 and 2.2, VACE, Wan-Animate 2, LTX-Video, HunyuanVideo 1.5, Helios."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers

from ..case import Case
from ..modular_parts import modular
from ..parts import LATENT_CHANNELS, TEXT_WIDTH, seeded, shifted_flow, t5_parts
from ..video_parts import clip_of_pictures, picture, siglip_parts, two_pictures
from .hunyuan_video import hunyuan_1_5
from .ltx import VIDEO as LTX
from .ltx import ltx
from .wan import CONDITIONED, VIDEO, from_pictures, helios, two_transformers, vace, wan, wan_vae


def modular_wan():
    return modular(diffusers.WanModularPipeline, wan())


def modular_from_pictures():
    return modular(diffusers.WanImage2VideoModularPipeline, from_pictures())


def modular_two(cls: type, **config):
    """Wan 2.2: a second transformer, with a guider of its own, takes over when little noise is left."""
    return modular(cls, two_transformers(**config))


def modular_vace():
    return modular(diffusers.Wan22VaceModularPipeline, vace(), transformer_2=vace().transformer)


def modular_hunyuan(from_picture: bool = False):
    cls = diffusers.HunyuanVideo15ImageToVideoPipeline if from_picture else diffusers.HunyuanVideo15Pipeline
    return modular(diffusers.HunyuanVideo15ModularPipeline, hunyuan_1_5(cls, siglip_parts() if from_picture else None))


def eightfold_vae():
    """Of the compression of the published one, which the model counts on."""
    return wan_vae(dim_mult=[1] * 4, temperal_downsample=[False, True, True], scale_factor_spatial=8)


def animate_2(cls: type):
    transformer = seeded(
        diffusers.WanAnimate2Transformer3DModel, text_len=32, in_dim=CONDITIONED, dim=32, ffn_dim=32, freq_dim=16, text_dim=TEXT_WIDTH,
        out_dim=LATENT_CHANNELS, num_heads=2, num_layers=1,
    )  # fmt: skip
    vision = transformers.CLIPVisionConfig(hidden_size=1280, intermediate_size=16, num_attention_heads=2, num_hidden_layers=2, image_size=224, patch_size=112)
    encoder = seeded(transformers.CLIPVisionModel, vision)
    return modular(cls, {"transformer": transformer, "image_encoder": encoder, "vae": eightfold_vae(), "scheduler": shifted_flow(), **t5_parts()})


def modular_helios(cls: type, scheduler: type = diffusers.HeliosScheduler, **config):
    return modular(cls, helios(diffusers.HeliosPipeline, scheduler(use_dynamic_shifting=True, **config)))


NEGATIVE = {"negative_prompt": ""}
CALL = {**VIDEO, **NEGATIVE}
GUIDED = {**NEGATIVE, "guidance_scale": 3.0}
ALONE: dict[str, Any] = {"one_sample": True, "remark": "all samples share the picture, which it encodes with a generator for each sample"}
ANIMATED = {
    "height": 32, "width": 32, "segment_frame_length": 5, "num_inference_steps": 4, "max_sequence_length": 32, "image": picture(),
    "driving_video": clip_of_pictures(5, flipped=True),
}  # fmt: skip
FLEX: dict[str, Any] = {"one_sample": True, "remark": "its FlexAttention has no gradient on the CPU"}
CHUNK = {**CALL, "num_latent_frames_per_chunk": 2}
PYRAMID = {**CHUNK, "height": 32, "width": 32, "pyramid_num_inference_steps_list": [2, 2, 2]}

CASES: dict[str, list[Case]] = {
    "WanModularPipeline": [Case(modular_wan, CALL)],
    "WanImage2VideoModularPipeline": [Case(modular_from_pictures, {**CALL, "image": picture()}, **ALONE)],
    "Wan22ModularPipeline": [Case(lambda: modular_two(diffusers.Wan22ModularPipeline), CALL)],
    "Wan22Image2VideoModularPipeline": [
        Case(lambda: modular_two(diffusers.Wan22Image2VideoModularPipeline, in_channels=CONDITIONED), {**CALL, "image": picture()}, **ALONE)
    ],
    "Wan22VaceModularPipeline": [Case(modular_vace, {**CALL, "video": clip_of_pictures(5), "mask": [picture().convert("L")] * 5}, one_sample=True)],
    "LTXModularPipeline": [
        Case(lambda: modular(diffusers.LTXModularPipeline, ltx()), {**LTX, **NEGATIVE}),
        Case(lambda: modular(diffusers.LTXModularPipeline, ltx()), {**LTX, **NEGATIVE}, {"image": two_pictures(32)}, variant="from images"),
    ],
    "HunyuanVideo15ModularPipeline": [
        Case(modular_hunyuan, {"height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 4, "guidance_scale": 3.0, **NEGATIVE}, one_sample=True),
        Case(
            lambda: modular_hunyuan(True),
            {"num_frames": 5, "num_inference_steps": 4, "guidance_scale": 3.0, **NEGATIVE, "image": picture()},
            variant="from images",
            one_sample=True,
        ),
    ],
    "WanAnimate2ModularPipeline": [Case(lambda: animate_2(diffusers.WanAnimate2ModularPipeline), {**ANIMATED, **GUIDED}, **FLEX)],
    "WanAnimate2DistilledModularPipeline": [Case(lambda: animate_2(diffusers.WanAnimate2DistilledModularPipeline), ANIMATED, **FLEX)],
    "HeliosModularPipeline": [Case(lambda: modular_helios(diffusers.HeliosModularPipeline, stage_range=[0, 1], stages=1), CHUNK)],
    "HeliosPyramidModularPipeline": [Case(lambda: modular_helios(diffusers.HeliosPyramidModularPipeline, gamma=0.33), PYRAMID)],
    "HeliosPyramidDistilledModularPipeline": [
        Case(lambda: modular_helios(diffusers.HeliosPyramidDistilledModularPipeline, diffusers.HeliosDMDScheduler, gamma=0.33), PYRAMID)
    ],
}

ABSENT: dict[str, str] = {}
