"""The preprocessing of CLIP in torch, so that gradients reach the pixels: resize, centre crop, normalise.

`transformers`' own processors go through 8-bit images. This follows them (the arithmetic of their PIL backend) on floats, and
differs from them by that rounding only. The settings come from the checkpoint's `preprocessor_config.json` or
`processor_config.json`, read without building a processor, which would need torchvision in some versions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # PIL's numbers


def flatten_frames(images: Tensor) -> Tensor:
    """(B, 3, H, W) as it is, (B, F, 3, H, W) as (B F, 3, H, W).

    Raises:
        ValueError: another shape.
    """
    if images.ndim not in (4, 5) or images.shape[-3] != 3:
        raise ValueError(f"Rewards take images (B, 3, H, W) or videos (B, F, 3, H, W), got the shape {tuple(images.shape)}.")
    return images.flatten(0, 1) if images.ndim == 5 else images


def repeat_for_frames(values: Tensor, images: Tensor) -> Tensor:
    """(B, ...) values of the prompts, repeated for each frame: (B F, ...)."""
    return values.repeat_interleave(images.shape[1], 0) if images.ndim == 5 else values


def mean_over_frames(values: Tensor, images: Tensor) -> Tensor:
    """(B F,) values of the frames: (B,), the mean of each video; (B,) values of images as they are."""
    return values.unflatten(0, images.shape[:2]).mean(1) if images.ndim == 5 else values


def where_finite(values: Tensor, images: Tensor) -> Tensor:
    """(N,) values of the images (N, ...), NaN where a pixel is not finite."""
    return torch.where(images.isfinite().flatten(1).all(1), values, torch.nan)


@dataclass(frozen=True)
class Preprocessing:
    """Callable on images (N, 3, H, W) in [0, 1].

    Attributes:
        size: of the shorter side, or (height, width); None leaves the size.
        crop: (height, width) of the centre crop; None leaves it out.
        mean, std: of each channel.
        mode: of the interpolation, with antialiasing.
        even_centre: an odd rest is cut as torchvision does, half of it rounded to an even number; else rounded down, as in transformers.
    """

    size: int | tuple[int, int] | None = 224
    crop: tuple[int, int] | None = (224, 224)
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    mode: str = "bicubic"
    even_centre: bool = False

    @classmethod
    def from_pretrained(cls, name: str) -> Preprocessing:
        """The settings of a checkpoint, a Hub name or a folder; what its file leaves out is CLIP's own."""
        from transformers import ImageProcessingMixin

        config, _ = ImageProcessingMixin.get_image_processor_dict(name)
        resample = config.get("resample", 3)
        if resample not in RESAMPLE:
            raise ValueError(f"{name} resizes with PIL's resample {resample}: 2 (bilinear) and 3 (bicubic) are known here.")
        size = _size(config.get("size", 224), shortest=True)
        crop = _size(config.get("crop_size", 224), shortest=False)
        normalize = config.get("do_normalize", True)
        return cls(
            size=size if config.get("do_resize", True) else None,
            crop=crop if config.get("do_center_crop", True) else None,
            mean=tuple(config.get("image_mean") or CLIP_MEAN) if normalize else (0.0,) * 3,
            std=tuple(config.get("image_std") or CLIP_STD) if normalize else (1.0,) * 3,
            mode=RESAMPLE[resample],
        )

    def __call__(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] to normalised (N, 3, *crop), float32, with the graph."""
        return normalised(self._crop(self._resize(images.float())), self.mean, self.std)

    def _resize(self, images: Tensor) -> Tensor:
        if self.size is None:
            return images
        height, width = images.shape[-2:]
        target = self.size
        if isinstance(target, int):
            short = min(height, width)
            target = (target * height // short, target * width // short)
        # Bicubic weights are negative in places. PIL resizes the width, then the height, and 8 bits cut the overshoot of each pass.
        for size in ((height, target[1]), target):
            if size != tuple(images.shape[-2:]):
                images = F.interpolate(images, size=size, mode=self.mode, antialias=True).clamp(0, 1)
        return images

    def _crop(self, images: Tensor) -> Tensor:
        if self.crop is None:
            return images
        (height, width), (rows, columns) = images.shape[-2:], self.crop
        if height < rows or width < columns:  # zeros around, as transformers does
            top, left = -(-max(0, rows - height) // 2), -(-max(0, columns - width) // 2)
            images = F.pad(images, (left, max(0, columns - width) - left, top, max(0, rows - height) - top))
            height, width = images.shape[-2:]
        half = (lambda rest: round(rest / 2)) if self.even_centre else (lambda rest: rest // 2)
        top, left = half(height - rows), half(width - columns)
        return images[..., top : top + rows, left : left + columns]


@dataclass(frozen=True)
class Letterbox:
    """Callable on images (N, 3, H, W) in [0, 1]: the longer side becomes `size`, black bars make a square, nothing is cut.

    `ResizeMaxSize` of the open_clip copy in hpsv2 1.2.0, on tensors: one bicubic pass with antialiasing, whose overshoot stays.
    """

    size: int = 224
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def __call__(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] to normalised (N, 3, size, size), float32, with the graph."""
        images, scale = images.float(), self.size / max(images.shape[-2:])
        if scale != 1:
            # A side of less than half a pixel is one pixel.
            images = F.interpolate(images, size=[max(1, round(side * scale)) for side in images.shape[-2:]], mode="bicubic", antialias=True)
        rows, columns = (self.size - side for side in images.shape[-2:])
        return normalised(F.pad(images, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)), self.mean, self.std)


def normalised(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(images - mean) / std of each channel."""
    shift, scale = (torch.tensor(v, device=images.device).view(-1, 1, 1) for v in (mean, std))
    return (images - shift) / scale


def _size(value: Any, *, shortest: bool) -> int | tuple[int, int]:
    """A config's `size` or `crop_size`: a number (the shorter side, or a square) or a dict."""
    if isinstance(value, int):
        return value if shortest else (value, value)
    if value.get("shortest_edge"):
        return value["shortest_edge"]
    return value["height"], value["width"]
