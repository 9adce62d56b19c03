"""Images, prompts and scores as JSON: what a remote reward and its server say to each other. Nothing is ever unpickled.

A request: `{"format", "images", "frames", "prompts", "columns"}`. In the format `safetensors`, images are one base64 string, a
safetensors file whose tensor `images` is float32, (B, 3, H, W) or (B, F, 3, H, W): exact. In the format `png`, they are a list of
B (or B F) base64 strings, PNG files: about ten times smaller, rounded to 8 bits. `frames` is F of PNG videos, else null.

An answer: `{"scores": {"reward": [0.5, null], ...}}`, null where the reward could not score (NaN or infinite); an error: `{"error": "..."}`.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
from typing import Any

import torch
from torch import Tensor

from .preprocessing import flatten_frames

FORMATS = ("safetensors", "png")
MAX_VALUES = 2**28  # 1 GiB of float32: no small file may unpack to more


def to_pil(images: Tensor) -> list:
    """(N, 3, H, W) in [0, 1] as PIL images, rounded to 8 bits."""
    from PIL import Image

    pixels = (images.detach().float() * 255).round().clamp(0, 255).nan_to_num().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in pixels]


def to_png(images: Tensor) -> list[str]:
    """(N, 3, H, W) in [0, 1] as base64 PNG files."""
    files = []
    for picture in to_pil(images):
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        files.append(base64.b64encode(buffer.getvalue()).decode())
    return files


def encode_request(images: Tensor, prompts: list[str], columns: dict[str, Any], format: str) -> bytes:
    """A request's body.

    Raises:
        ValueError: a column holds something that JSON has no word for, or a pixel of a PNG would be NaN.
    """
    frames = None
    if format == "png":
        if not images.isfinite().all():
            raise ValueError("PNG files have no NaN: send such images in the format 'safetensors'.")
        frames, packed = (images.shape[1] if images.ndim == 5 else None), to_png(flatten_frames(images))
    else:
        from safetensors.torch import save

        packed = base64.b64encode(save({"images": images.detach().float().cpu().contiguous()})).decode()
    try:
        return json.dumps({"format": format, "images": packed, "frames": frames, "prompts": list(prompts), "columns": columns}).encode()
    except TypeError as error:
        raise ValueError(f"A remote reward gets the data set's columns as JSON: {error}.") from error


def decode_request(body: bytes) -> tuple[Tensor, list[str], dict[str, Any]]:
    """Images (B, 3, H, W) or (B, F, 3, H, W) float32, prompts and columns.

    Raises:
        ValueError: the body is no such request.
    """
    request = _object(body)
    prompts, columns, format = request.get("prompts"), request.get("columns") or {}, request.get("format")
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("'prompts' must be a list of strings.")
    if format not in FORMATS:
        raise ValueError(f"'format' must be one of {', '.join(FORMATS)}, got {format!r}.")
    if not isinstance(columns, dict) or not all(isinstance(values, list) and len(values) == len(prompts) for values in columns.values()):
        raise ValueError(f"'columns' must be an object of lists of {len(prompts)} values, one a prompt.")
    images = _from_png(request.get("images"), request.get("frames")) if format == "png" else _from_safetensors(request.get("images"))
    if len(images) != len(prompts):
        raise ValueError(f"As many prompts as images are needed: got {len(images)} images and {len(prompts)} prompts.")
    return images, prompts, columns


def encode_scores(scores: dict[str, Tensor]) -> bytes:
    """An answer's body; float32 numbers survive it exactly."""
    rows = {name: [value if math.isfinite(value) else None for value in values.tolist()] for name, values in scores.items()}
    return json.dumps({"scores": rows}, allow_nan=False).encode()


def decode_scores(body: bytes) -> dict[str, Tensor]:
    """The scores of an answer, NaN for null.

    Raises:
        ValueError: the body is no answer.
    """
    scores = _object(body).get("scores")
    if not isinstance(scores, dict) or not all(isinstance(values, list) for values in scores.values()):
        raise ValueError("the answer has no object 'scores' of lists of numbers.")
    for name, values in scores.items():
        if not all(value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)) for value in values):
            raise ValueError(f"the scores {name!r} hold something else than numbers and null.")
    return {name: torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float32) for name, values in scores.items()}


def _object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the body is no JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError("the body is no JSON object.")
    return value


def _bytes(text: Any) -> bytes:
    if not isinstance(text, str):
        raise ValueError("'images' must hold base64 strings.")
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"'images' is no base64: {error}.") from error


def _from_safetensors(text: Any) -> Tensor:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(_bytes(text))
    except SafetensorError as error:
        raise ValueError(f"'images' is no safetensors file: {error}.") from error
    images = tensors.get("images")
    if images is None or images.dtype != torch.float32 or images.ndim not in (4, 5) or images.shape[-3] != 3:
        raise ValueError("the safetensors file must hold a float32 tensor 'images', (B, 3, H, W) or (B, F, 3, H, W).")
    return images


def _from_png(texts: Any, frames: Any) -> Tensor:
    import numpy as np
    from PIL import Image

    if not isinstance(texts, list) or not texts:
        raise ValueError("'images' must be a list of base64 PNG files.")
    if frames is not None and (not isinstance(frames, int) or frames < 1 or len(texts) % frames):
        raise ValueError(f"'frames' must be a whole number that divides the number of images, got {frames!r} for {len(texts)}.")
    arrays, size = [], None
    for text in texts:
        try:
            picture = Image.open(io.BytesIO(_bytes(text)), formats=["PNG"])
            if len(texts) * 3 * picture.width * picture.height > MAX_VALUES:
                raise ValueError(f"{len(texts)} images of {picture.width} x {picture.height} are too many: send fewer at a time.")
            if picture.size != (size or picture.size):
                raise ValueError(f"images of one request must have one size, got {size} and {picture.size}.")
            size = picture.size
            arrays.append(np.asarray(picture.convert("RGB")))
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"'images' holds something that is no PNG file: {error}.") from error
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255
    return images if frames is None else images.unflatten(0, (-1, frames))
