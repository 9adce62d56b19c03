"""Size of the image as a JPEG file: the compressibility rewards of DDPO (https://arxiv.org/abs/2305.13301, section 5.1).

The file is written by PIL at quality 95 from the image rounded (not truncated) to 8 bits, and its size counted in kilobytes
of 1000 bytes, as in https://github.com/kvablack/ddpo-pytorch. No model, no gradient: the rewards to try first.
"""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor

from .preprocessing import flatten_frames, mean_over_frames, where_finite
from .wire import to_pil


def jpeg_sizes(images: Tensor, quality: int = 95) -> Tensor:
    """Sizes in kB (1000 bytes) of (B, 3, H, W) or (B, F, 3, H, W) images in [0, 1]: (B,), the mean over frames, NaN where a pixel is."""
    frames, sizes = flatten_frames(images.detach()), []
    for picture in to_pil(frames):
        buffer = io.BytesIO()
        picture.save(buffer, format="JPEG", quality=quality)
        sizes.append(buffer.tell() / 1000)
    return mean_over_frames(where_finite(torch.tensor(sizes, device=images.device), frames), images)


def jpeg_incompressibility(images: Tensor, prompts: list[str], quality: int = 95, **columns: Any) -> Tensor:
    """(B,) size of the JPEG file in kB: rich texture scores high."""
    return jpeg_sizes(images, quality)


def jpeg_compressibility(images: Tensor, prompts: list[str], quality: int = 95, **columns: Any) -> Tensor:
    """(B,) minus the size of the JPEG file in kB: smooth images score high."""
    return -jpeg_sizes(images, quality)
