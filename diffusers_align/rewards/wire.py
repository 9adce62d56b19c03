"""Images, prompts and scores as JSON: what a remote reward and its server say to each other. Nothing is ever unpickled.

A request: `{"format", "images", "frames", "prompts", "columns", "sampling_rate"}`. In the format `safetensors`, images are one base64 string, a
safetensors file whose tensor `images` is float32, (B, 3, H, W), (B, F, 3, H, W), or (B, C, T) of sounds: exact. The sound of videos is another of its
tensors, `audio`, and `sampling_rate` belongs to either, else null. In the format `png`, they are a list of B (or B F) base64 strings, PNG files: about ten
times smaller, rounded to 8 bits, without sound. `frames` is F of PNG videos, else null. A picture in a column, such as the source of an edit, is an object
`{"image/png;base64": "..."}`.

An answer: `{"scores": {"reward": [0.5, null], ...}}`, null where the reward could not score (NaN or infinite); an error: `{"error": "..."}`.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .preprocessing import flatten_frames
from .web import printable

FORMATS = ("safetensors", "png")
PICTURE = "image/png;base64"  # the only key of an object that is a picture in a column
MAX_VALUES = 2**28  # 1 GiB of float32: no small file may unpack to more
MAX_PARTS = 2**20  # of a request's or an answer's JSON


def to_pil(images: Tensor) -> list:
    """(N, 3, H, W) in [0, 1] as PIL images, rounded to 8 bits."""
    from PIL import Image

    pixels = (images.detach().float() * 255).round_().clamp_(0, 255).nan_to_num_().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in pixels]


def to_png(images: Tensor) -> list[str]:
    """(N, 3, H, W) in [0, 1] as base64 PNG files."""
    return [_as_png(picture) for picture in to_pil(images)]


def _as_png(picture: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def encode_request(
    images: Tensor, prompts: list[str], columns: dict[str, Any], format: str, sampling_rate: int | None = None, audio: Tensor | None = None
) -> bytes:
    """A request's body.

    Raises:
        ValueError: a column holds something that is no picture and that JSON has no word for, a pixel of a PNG would be NaN, or sound goes into one.
    """
    frames = None
    if format == "png":
        if images.ndim == 3 or audio is not None:
            raise ValueError("PNG files hold no sound: send it in the format 'safetensors', which is used without `?format=png`.")
        if not images.isfinite().all():
            raise ValueError("PNG files have no NaN: send such images in the format 'safetensors'.")
        frames, packed = (images.shape[1] if images.ndim == 5 else None), to_png(flatten_frames(images))
    else:
        from safetensors.torch import save

        tensors = {"images": images} if audio is None else {"images": images, "audio": audio}
        packed = base64.b64encode(save({name: x.detach().float().cpu().contiguous() for name, x in tensors.items()})).decode()
    try:
        request = {"format": format, "images": packed, "frames": frames, "prompts": list(prompts), "columns": columns, "sampling_rate": sampling_rate}
        return json.dumps(request, default=_picture).encode()
    except TypeError as error:
        raise ValueError(f"A remote reward gets the data set's columns as JSON: {error}. Leave that column out.") from error


def _picture(value: Any) -> dict[str, str]:
    from PIL import Image

    if not isinstance(value, Image.Image):
        raise TypeError(f"{type(value).__name__} is no picture, text, number, list or object of these")
    return {PICTURE: _as_png(value if value.mode in ("1", "L", "LA", "I;16", "RGB", "RGBA") else value.convert("RGB"))}


@dataclass(frozen=True)
class ScoreRequest:
    """A request whose images are still packed.

    Attributes:
        files: one safetensors file, or PNG files.
        frames: of PNG videos, else None.
        values: the pixel values that the files unpack to, known from their headers.
        sampling_rate: of the sound; None without.
    """

    prompts: list[str]
    columns: dict[str, list]
    format: str
    files: list[bytes]
    frames: int | None
    values: int
    sampling_rate: int | None = None

    def unpacked(self) -> tuple[Tensor, dict[str, Any]]:
        """Images (B, 3, H, W) or (B, F, 3, H, W), or sounds (B, C, T), float32: four bytes a value; and the columns, with what there is of a sound.

        Raises:
            ValueError: the files hold something else, or not as many images as there are prompts.
        """
        tensors = {"images": _from_png(self.files, self.frames)} if self.format == "png" else _from_safetensors(self.files[0])
        images = tensors.pop("images")
        if len(images) != len(self.prompts):
            raise ValueError(f"As many prompts as images are needed: got {len(images)} images and {len(self.prompts)} prompts.")
        columns = {name: _opened(values) for name, values in self.columns.items()}
        return images, {**columns, **tensors, **({} if self.sampling_rate is None else {"sampling_rate": self.sampling_rate})}


def _opened(value: Any) -> Any:
    """Columns with the pictures in them read."""
    if isinstance(value, list):
        return [_opened(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    if set(value) != {PICTURE}:
        return {key: _opened(entry) for key, entry in value.items()}
    file = _bytes(value[PICTURE])
    _png_values([file])
    with _png(file) as picture:
        return picture.copy()


def read_request(body: bytes) -> ScoreRequest:
    """A request's parts, with nothing unpacked.

    Raises:
        ValueError: the body is no such request, or its images unpack to more than `MAX_VALUES`.
    """
    request = _object(body)
    prompts, columns, format, packed = request.get("prompts"), request.get("columns") or {}, request.get("format"), request.get("images")
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("'prompts' must be a list of strings.")
    if format not in FORMATS:
        raise ValueError(f"'format' must be one of {', '.join(FORMATS)}, got {format!r}.")
    if not isinstance(columns, dict) or not all(isinstance(values, list) and len(values) == len(prompts) for values in columns.values()):
        raise ValueError(f"'columns' must be an object of lists of {len(prompts)} values, one per prompt.")
    if format == "png" and not (isinstance(packed, list) and packed):
        raise ValueError("'images' must be a list of base64 PNG files.")
    files, frames = [_bytes(text) for text in packed] if format == "png" else [_bytes(packed)], request.get("frames")
    if format == "png" and frames is not None and (not isinstance(frames, int) or frames < 1 or len(files) % frames):
        raise ValueError(f"'frames' must be a whole number that divides the number of images, got {frames!r} for {len(files)}.")
    values = _png_values(files) if format == "png" else len(files[0]) // 4
    if values > MAX_VALUES:
        raise ValueError(f"Images of {values} values are too many, {MAX_VALUES} are allowed: send fewer at a time.")
    rate = request.get("sampling_rate")
    if rate is not None and (not isinstance(rate, int) or isinstance(rate, bool) or rate < 1):
        raise ValueError(f"'sampling_rate' must be a whole number of 1 or more, or null, got {rate!r:.100}.")
    return ScoreRequest(prompts, columns, format, files, frames, values, rate)


def decode_request(body: bytes) -> tuple[Tensor, list[str], dict[str, Any]]:
    """Images (B, 3, H, W) or (B, F, 3, H, W), or sounds (B, C, T), float32, prompts and columns, with what there is of a sound.

    Raises:
        ValueError: the body is no such request.
    """
    request = read_request(body)
    images, columns = request.unpacked()
    return images, request.prompts, columns


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
            raise ValueError(f"the scores {printable(name, 100)!r} hold something else than numbers and null.")
    try:
        return {name: torch.tensor([math.nan if value is None else float(value) for value in values], dtype=torch.float32) for name, values in scores.items()}
    except OverflowError as error:
        raise ValueError("the scores hold a whole number beyond the range of floats.") from error


def _object(body: bytes) -> dict[str, Any]:
    if sum(map(body.count, (b"[", b"{", b","))) > MAX_PARTS:  # each may become an object of some hundred bytes
        raise ValueError(f"the body's JSON has more than {MAX_PARTS} brackets and commas.")
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


def _from_safetensors(file: bytes) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(file)
    except SafetensorError as error:
        raise ValueError(f"'images' is no safetensors file: {error}.") from error
    images, audio = tensors.get("images"), tensors.get("audio")
    if images is None or images.dtype != torch.float32 or not (images.ndim == 3 or (images.ndim in (4, 5) and images.shape[-3] == 3)):
        raise ValueError("the safetensors file must hold a float32 tensor 'images', (B, 3, H, W) or (B, F, 3, H, W), or (B, C, T) of sounds.")
    if audio is not None and (audio.dtype != torch.float32 or audio.ndim != 3 or len(audio) != len(images)):
        raise ValueError("the safetensors file's tensor 'audio' must be float32, (B, C, T), of as many sounds as images.")
    return {"images": images} if audio is None else {"images": images, "audio": audio}


@contextmanager
def _png(file: bytes) -> Iterator[Any]:
    """The file opened, its pixels not yet read."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(file), formats=["PNG"]) as picture:
            yield picture
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"'images' holds something that is no PNG file: {error}.") from error


def _png_values(files: list[bytes]) -> int:
    """How many values the files unpack to, by their headers. The first one's size is every one's."""
    size = None
    for file in files:
        with _png(file) as picture:
            if picture.size != (size or picture.size):
                raise ValueError(f"images of one request must have one size, got {size} and {picture.size}.")
            size = picture.size
        values = len(files) * 3 * size[0] * size[1]
        if values > MAX_VALUES:
            raise ValueError(f"{len(files)} images of {size[0]} x {size[1]} are too many: send fewer at a time.")
    return values


def _from_png(files: list[bytes], frames: int | None) -> Tensor:
    import numpy as np

    from ..data.images import in_srgb

    images = None
    for i, file in enumerate(files):
        with _png(file) as picture:
            pixels = torch.from_numpy(np.array(in_srgb(picture))).permute(2, 0, 1)
        images = torch.empty(len(files), *pixels.shape) if images is None else images
        torch.div(pixels, 255, out=images[i])
    return images if frames is None else images.unflatten(0, (-1, frames))
