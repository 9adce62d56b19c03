"""SkyReels V2: Wan's model, at one time for all frames or at a time for each (diffusion forcing)."""

from __future__ import annotations

from typing import Any

import diffusers

from ..case import Case
from ..video_parts import VISION_WIDTH, clip_of_pictures, clip_vision_parts, multistep_flow, picture, wan_transformer
from .wan import CONDITIONED, SIZED, VIDEO, wan


def skyreels(cls: type = diffusers.SkyReelsV2Pipeline, parts: dict[str, Any] | None = None, **config: Any):
    denoiser = wan_transformer(diffusers.SkyReelsV2Transformer3DModel, **config)
    return wan(cls, transformer=denoiser, scheduler=multistep_flow(flow_shift=8.0), **(parts or {}))


CASES: dict[str, list[Case]] = {
    "SkyReelsV2Pipeline": [Case(skyreels, VIDEO)],
    "SkyReelsV2ImageToVideoPipeline": [
        Case(
            lambda: skyreels(diffusers.SkyReelsV2ImageToVideoPipeline, clip_vision_parts(), in_channels=CONDITIONED, image_dim=VISION_WIDTH),
            {**VIDEO, "image": picture()},
        )
    ],
    "SkyReelsV2DiffusionForcingPipeline": [Case(lambda: skyreels(diffusers.SkyReelsV2DiffusionForcingPipeline), VIDEO)],
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": [
        Case(lambda: skyreels(diffusers.SkyReelsV2DiffusionForcingImageToVideoPipeline), {**VIDEO, "image": picture()})
    ],
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": [
        Case(
            lambda: skyreels(diffusers.SkyReelsV2DiffusionForcingVideoToVideoPipeline),
            {**SIZED, "video": clip_of_pictures(5), "overlap_history": 3, "num_frames": 9, "base_num_frames": 5},
            one_sample=True,
        )
    ],
}

ABSENT: dict[str, str] = {}
