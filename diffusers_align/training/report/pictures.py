"""Pictures that tell how training goes: grids of samples, before and after, the reward curve. Videos are strips of frames there, sounds spectrograms."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, PngImagePlugin
from torch import Tensor

from ...data.augment import to_tensor
from ...data.images import LazyImage
from ...data.prompts import Prompt
from .lettering import LINE, width_of, wrapped, write
from .sounds import COLUMNS, ROWS, spectrogram

MOST_LINES = 4
MARGIN = 2
FRAMES = 4


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] to a PIL image; of a video (F, 3, H, W) the middle frame. What is not finite comes out magenta: no picture has it by chance.

    Raises:
        ValueError: a sound (C, T).
    """
    if image.ndim == 2:
        raise ValueError(f"A sound (C, T) = {tuple(image.shape)} is no picture: report.sounds.spectrogram makes one of it.")
    if image.ndim == 4:
        image = image[len(image) // 2]
    pixels = image.detach().float().cpu()
    broken = ~pixels.isfinite().all(0)
    pixels = pixels.nan_to_num(0.0).clamp(0, 1)
    pixels[:, broken] = torch.tensor([1.0, 0.0, 1.0])[:, None]
    return Image.fromarray(pixels.mul(255).round().byte().permute(1, 2, 0).numpy())


def film_strip(video: Tensor, frames: int = FRAMES) -> Tensor:
    """(3, H, W') of a video (F, 3, H, W): so many of its frames, or all of a shorter one, at equal distances from the first to the last, side by side with
    a white line between two."""
    chosen = torch.linspace(0, len(video) - 1, min(frames, len(video))).round().long().tolist()
    line = torch.ones_like(video[0, :, :, : max(1, video.shape[-1] // 32)])
    return torch.cat([part for i in chosen for part in (line, video[i])][1:], -1)


def picture_of(image: Tensor) -> Tensor:
    """(3, H, W) of what a pipeline made: a picture as it is, a video's film strip, a sound's spectrogram."""
    return film_strip(image) if image.ndim == 4 else spectrogram(image) if image.ndim == 2 else image


def grid(images: list[Tensor], captions: list[str], columns: int = 8, cell: int = 128) -> Image.Image:
    """Images in rows, each above its caption. The whole captions are in the picture's metadata (`save`).

    Args:
        columns: at most; fewer where there are fewer images, or wider ones.
        cell: width of a column, pixels; of a frame of a film strip, and of half a spectrogram. Images keep their proportions.

    Raises:
        ValueError: no image, or not a caption for each.
    """
    _check(len(images), len(captions))
    columns, cell = _wide(images, columns, cell)
    columns = _columns(len(images), columns)
    lines = [wrapped(caption, cell - 2 * MARGIN, MOST_LINES) for caption in captions]
    height, label = _height(images, cell), _label(lines)
    sheet = _sheet(columns * cell, math.ceil(len(images) / columns) * (height + label), captions)
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = (i % columns) * cell, (i // columns) * (height + label)
        _paste(sheet, image, x, y, cell, height)
        write(draw, x + MARGIN, y + height, lines[i])
    return sheet


def before_and_after(
    before: list[Tensor], after: list[Tensor], captions: list[str], columns: int = 8, cell: int = 128, given: dict[str, list[Tensor]] | None = None
) -> Image.Image:
    """Rows at equal prompts and seeds: the pretrained model above, the aligned one below, and over both the `given_pictures`."""
    return comparison({**(given or {}), "before": before, "after": after}, captions, columns, cell)


def samples(images: list[Tensor], captions: list[str], given: dict[str, list[Tensor]] | None = None) -> Image.Image:
    """A `grid`; where there are `given_pictures`, a `comparison` with these above the images."""
    return comparison({**given, "sample": images}, captions) if given else grid(images, captions)


def given_pictures(prompts: Sequence[Prompt], number: int) -> dict[str, list[Tensor]]:
    """The pictures that the pipeline gets for `number` samples, prompt after prompt in turn, by the row's name in a `comparison`; several
    pictures of one argument stand side by side. Empty where it gets none."""
    found: dict[str, list[Tensor]] = {}
    for i in range(number):
        for name, value in prompts[i % len(prompts)].inputs.items():
            if pictures := _opened(value):
                found.setdefault(f"{name}, given", []).append(torch.cat(pictures, -1))
    return {name: pictures for name, pictures in found.items() if len(pictures) == number}


def _opened(value: Any) -> list[Tensor]:
    """The pictures of an input, (3, H, W) each, as high as the first; of what holds no pictures none."""
    pictures = [entry.open() for entry in (value if isinstance(value, list) else [value]) if isinstance(entry, LazyImage)]
    return [to_tensor(picture, pictures[0].height, max(1, round(picture.width * pictures[0].height / picture.height))) for picture in pictures]


def comparison(models: dict[str, list[Tensor]], captions: list[str], columns: int = 8, cell: int = 128) -> Image.Image:
    """A row per model under the captions, at equal prompts and seeds in each column; as many such blocks as the captions need.

    The models' names stand on the left.

    Raises:
        ValueError: no image, or a model without an image for each caption.
    """
    for images in models.values():
        _check(len(images), len(captions))
    columns, cell = _wide([image for images in models.values() for image in images], columns, cell)
    columns = _columns(len(captions), columns)
    names = {name: wrapped(name, cell - 2 * MARGIN, MOST_LINES) for name in models}
    left = math.ceil(max(width_of(line) for lines in names.values() for line in lines)) + 3 * MARGIN
    lines = [wrapped(caption, cell - 2 * MARGIN, MOST_LINES) for caption in captions]
    height, label = _height([image for images in models.values() for image in images], cell), _label(lines)
    block = label + len(models) * height
    sheet = _sheet(left + columns * cell, math.ceil(len(captions) / columns) * block, captions)
    draw = ImageDraw.Draw(sheet)
    for i in range(len(captions)):
        x, y = left + (i % columns) * cell, (i // columns) * block
        write(draw, x + MARGIN, y, lines[i])
        for row, (name, images) in enumerate(models.items()):
            top = y + label + row * height
            _paste(sheet, images[i], x, top, cell, height)
            if i % columns == 0:
                write(draw, MARGIN, top + MARGIN, names[name])
    return sheet


def save(sheet: Image.Image, path: Path) -> None:
    """As PNG, with what the sheet knows of itself as text chunks in JSON: `captions`, whole, and `cells`, the box of each image."""
    chunks = PngImagePlugin.PngInfo()
    for name, text in sheet.info.items():
        chunks.add_itxt(name, text)
    sheet.save(path, format="PNG", pnginfo=chunks)


def _check(images: int, captions: int) -> None:
    if not images or images != captions:
        raise ValueError(f"A sheet needs images and a caption for each, got {images} images and {captions} captions.")


def _columns(number: int, most: int) -> int:
    """Columns that fill as few rows as `most` would, evenly."""
    return math.ceil(number / math.ceil(number / most))


def _wide(images: list[Tensor], columns: int, cell: int) -> tuple[int, int]:
    """Fewer and wider columns for film strips and spectrograms."""
    width = max(min(FRAMES, len(image)) if image.ndim == 4 else COLUMNS // ROWS if image.ndim == 2 else 1 for image in images)
    return max(1, columns // width), cell * width


def _label(lines: list[list[str]]) -> int:
    return max(map(len, lines)) * LINE + MARGIN


def _height(images: list[Tensor], cell: int) -> int:
    """Of a cell that holds the tallest of the images, at most twice as high as wide."""
    return min(2 * cell, max(round(cell * height / width) for height, width in map(_size, images)))


def _size(image: Tensor) -> tuple[int, int]:
    """Height and width of its picture."""
    return (ROWS, COLUMNS) if image.ndim == 2 else tuple(film_strip(image).shape[1:]) if image.ndim == 4 else tuple(image.shape[1:])


def _sheet(width: int, height: int, captions: list[str]) -> Image.Image:
    sheet = Image.new("RGB", (width, height), "white")
    sheet.info |= {"captions": json.dumps(captions, ensure_ascii=False), "cells": "[]"}
    return sheet


def _paste(sheet: Image.Image, image: Tensor, x: int, y: int, width: int, height: int) -> None:
    """In the middle of its cell, as large as it fits; spectrograms, which have no borders of their own, with some white around them."""
    picture, line = to_pil(picture_of(image)), 2 * MARGIN if image.ndim == 2 else 0
    scale = min((width - line) / picture.width, (height - line / 2) / picture.height)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    picture = picture.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
    left, top = x + (width - size[0]) // 2, y + (height - size[1]) // 2
    sheet.paste(picture, (left, top))
    sheet.info["cells"] = json.dumps([*json.loads(sheet.info["cells"]), [left, top, left + size[0], top + size[1]]])


def reward_curve(history: list[dict[str, float]], path: Path) -> None:
    """Mean reward an epoch, with its standard error where that is logged, or where there are no rollouts the accuracy on pairs or the loss; and the distance
    to the pretrained model where logged, or that of a trust region's step. Epochs without a number are gaps; without any there is no picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labels = {"reward": "mean reward of rollouts", "accuracy": "accuracy on the epoch's pairs", "loss": "training loss"}
    name = next((name for name in labels if any(name in row for row in history)), None)
    if name is None:
        return
    epochs, with_kl = [row["epoch"] for row in history], any("kl" in row for row in history)
    figure = Figure(figsize=(6, 5 if with_kl else 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2 if with_kl else 1, 1, sharex=True, squeeze=False)[:, 0]
    values, error = [row.get(name, float("nan")) for row in history], [row.get(f"{name}_se", 0.0) for row in history]
    dots = {"marker": ".", "markersize": 4}  # a line alone shows nothing of an epoch that has no neighbour
    axes[0].plot(epochs, values, color="tab:blue", **dots)
    axes[0].fill_between(epochs, [v - e for v, e in zip(values, error)], [v + e for v, e in zip(values, error)], alpha=0.25, color="tab:blue")
    axes[0].set_ylabel(labels[name] + (", s.e." if any(error) else ""))
    if with_kl:
        axes[1].plot(epochs, [row.get("kl", float("nan")) for row in history], color="tab:red", **dots)
        axes[1].set_ylabel("KL of the step" if any("accepted" in row for row in history) else "distance to the\npretrained model")
    axes[-1].set_xlabel("epoch")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=110)
