"""Tiny components that several video and picture-conditioned families share: pictures as PIL images, encoders of pictures, the denoiser of Wan."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers
from PIL import Image

from .parts import LATENT_CHANNELS, TEXT_WIDTH, photograph, seeded

VISION_WIDTH = 4


def picture(size: int = 16, flipped: bool = False) -> Image.Image:
    values = photograph(size)[0].permute(1, 2, 0).mul(255).round().to(torch.uint8).numpy()
    image = Image.fromarray(values)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else image


def two_pictures(size: int = 16) -> list[Image.Image]:
    return [picture(size), picture(size, flipped=True)]


def clip_of_pictures(frames: int, size: int = 16, flipped: bool = False) -> list[Image.Image]:
    """A picture that grows brighter frame by frame."""
    return [Image.eval(picture(size, flipped), lambda value, k=k: value * (k + 1) // frames) for k in range(frames)]


def two_clips(frames: int, size: int = 16) -> list[list[Image.Image]]:
    return [clip_of_pictures(frames, size), clip_of_pictures(frames, size, flipped=True)]


def clip_vision(width: int = VISION_WIDTH, projection: int = VISION_WIDTH, size: int = 4, patch: int = 1, projected: bool = True) -> torch.nn.Module:
    config = transformers.CLIPVisionConfig(
        hidden_size=width, projection_dim=projection, num_hidden_layers=2, num_attention_heads=2, image_size=size, intermediate_size=16, patch_size=patch
    )
    return seeded(transformers.CLIPVisionModelWithProjection if projected else transformers.CLIPVisionModel, config)


def clip_vision_parts(size: int = 4, **config: Any) -> dict[str, Any]:
    processor = transformers.CLIPImageProcessor(crop_size=size, size=size)
    return {"image_encoder": clip_vision(size=size, **config), "image_processor": processor}


# Of Wan's transformer and those that are built like it.
TRANSFORMER = {
    "in_channels": LATENT_CHANNELS, "out_channels": LATENT_CHANNELS, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 12,
    "text_dim": TEXT_WIDTH, "freq_dim": 16, "ffn_dim": 32, "cross_attn_norm": True,
}  # fmt: skip


def wan_transformer(cls: type = diffusers.WanTransformer3DModel, **config: Any) -> torch.nn.Module:
    return seeded(cls, **{**TRANSFORMER, "rope_max_seq_len": 32, **config})


def multistep_flow(**config: Any) -> diffusers.UniPCMultistepScheduler:
    return diffusers.UniPCMultistepScheduler(**{"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0, **config})


def siglip_parts(size: int = 16) -> dict[str, Any]:
    config = transformers.SiglipVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=size, patch_size=8)
    processor = transformers.SiglipImageProcessor(size={"height": size, "width": size})
    return {"image_encoder": seeded(transformers.SiglipVisionModel, config), "feature_extractor": processor}
