"""The five kinds of preference data, the checks that a row passes, and images that are read when asked for."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

KINDS = {
    "captioned": ("prompt", "image"),
    "pair": ("prompt", "image_0", "image_1", "label_0"),
    "binary": ("prompt", "image", "label"),
    "scored": ("prompt", "image", "reward"),
    "ranked": ("prompt", "images", "ranks"),
}
TRUE, FALSE = {"true", "yes", "1", "1.0"}, {"false", "no", "0", "0.0"}


class BadRow(ValueError):
    """A row that is broken; the message says how."""


class LeftOut(Exception):
    """A sound row that says nothing about preferences; the message is the heading it is counted under."""


@dataclass(frozen=True, eq=False)
class LazyImage:
    """An image that costs no memory until it is opened.

    Args:
        source: a path, an image file's bytes, a PIL image, or a function that returns one of them.
        uid: what the data set calls the image, where it does.
    """

    source: Path | bytes | Image.Image | Callable[[], Any]
    uid: str | None = None

    def _load(self) -> Path | bytes | Image.Image:
        value = self.source
        if callable(value):
            value = value()
        if isinstance(value, dict):
            value = value["bytes"] or Path(value["path"])
        return value

    def open(self) -> Image.Image:
        """The image in RGB, upright as its EXIF tag says, on white where it is transparent.

        Raises:
            OSError: the file is missing, truncated or no image.
            BadRow: its pixels have no known range.
        """
        image = ImageOps.exif_transpose(_decoder(self._load()))
        _check_range(image)
        if image.mode.startswith("I"):  # of 16 bits, which `convert` would cut off at 255
            image = image.convert("I").point(lambda value: value * (255 / 65535) + 0.5).convert("L")
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")

    def check(self, verify: str) -> None:
        """Decode the image (`verify="full"`), or read its header only (`"header"`).

        Raises:
            BadRow: that cannot be done, or the pixels have no known range.
        """
        try:
            with _decoder(self._load()) as image:
                _check_range(image)
                if verify == "full":
                    image.load()
        except BadRow:
            raise
        except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error and more on broken files
            raise BadRow(f"{type(error).__name__}: {error}") from error

    def content_hash(self) -> str:
        """SHA-256 of the image's file, or of a PIL image's pixels in RGB: the same image has the same key wherever it lies."""
        value = self._load()
        if isinstance(value, Image.Image):
            value = self.open()
            value = f"{value.mode}{value.size}".encode() + value.tobytes()
        return hashlib.sha256(value.read_bytes() if isinstance(value, Path) else value).hexdigest()

    @property
    def identity(self) -> str:
        """What tells whether two rows show the same image: the data set's name for it, else its path, else its content."""
        if self.uid is not None:
            return self.uid
        return str(self.source) if isinstance(self.source, Path) else self.content_hash()


def _decoder(value: Path | bytes | Image.Image) -> Image.Image:
    return value.copy() if isinstance(value, Image.Image) else Image.open(io.BytesIO(value) if isinstance(value, bytes) else value)


def _check_range(image: Image.Image) -> None:
    """Raises BadRow where it is not known what the largest pixel means: float images, and integers of 32 bits."""
    if image.mode == "F" or image.mode == "I" and image.format != "PNG":  # as 16-bit PNG files come in some versions of Pillow
        raise BadRow(f"its pixels (mode {image.mode}) have no known range: save it with 8 or 16 bits a channel")


def canonical(kind: str, fields: dict) -> dict:
    """The columns of `KINDS[kind]` from fields of those names, in their own types; pairs have a `weight` besides.

    Raises:
        BadRow: a field is missing, empty, not a number, or outside its range.
        LeftOut: the row has no label.
    """
    row: dict[str, Any] = {"prompt": _text(fields.get("prompt"))}
    if kind == "ranked":
        row |= {"images": _list(fields, "images"), "ranks": [_number(rank, "ranks") for rank in _list(fields, "ranks")]}
        if len(row["images"]) != len(row["ranks"]):
            raise BadRow(f"{len(row['images'])} images but {len(row['ranks'])} ranks")
    elif kind == "pair":
        weight = 1 if fields.get("weight") in (None, "") else fields["weight"]
        row |= {"image_0": fields.get("image_0"), "image_1": fields.get("image_1")}
        row |= {"label_0": _probability(_labelled(fields, "label_0"), "label_0"), "weight": _number(weight, "weight", 0)}
    else:
        row["image"] = fields.get("image")
        if kind == "binary":
            row["label"] = boolean(_labelled(fields, "label"), "label")
        elif kind == "scored":
            row["reward"] = _number(fields.get("reward"), "reward")
    for name, image in images_of(row):
        if image is None or isinstance(image, str) and not image.strip():
            raise BadRow(f"no {name}")
    return row


def images_of(row: dict) -> list[tuple[str, Any]]:
    """The (name, image) of a canonical row: `image`, `image_0`, `image_1`, or `images[i]`."""
    single = [(name, row[name]) for name in ("image", "image_0", "image_1") if name in row]
    return single + [(f"images[{i}]", image) for i, image in enumerate(row.get("images", ()))]


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise BadRow("the prompt is empty" if value is None or isinstance(value, str) else f"the prompt is no text: {value!r:.60}")
    return value.strip()


def _labelled(fields: dict, name: str) -> object:
    if fields.get(name) in (None, ""):
        raise LeftOut("without a label")
    return fields[name]


def _number(value: object, name: str, low: float = -math.inf, high: float = math.inf) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise BadRow(f"no {name}" if value is None else f"{name} is not a number: {value!r:.60}") from None
    if not math.isfinite(number) or not low <= number <= high:
        raise BadRow(f"{name} is {number:g}" + (f", outside [{low:g}, {high:g}]" if math.isfinite(number) else ""))
    return number


def _probability(value: object, name: str) -> float:
    """A number in [0, 1]; true and false, also where a .csv file spells them out, are 1 and 0."""
    certain = str(value).strip().lower() in TRUE | FALSE
    return float(boolean(value, name)) if certain else _number(value, name, 0, 1)


def boolean(value: object, name: str) -> bool:
    """True or false, also where a .csv file spells it out or counts 1 and 0.

    Raises:
        BadRow: it is neither.
    """
    word = str(value).strip().lower()
    if word not in TRUE | FALSE:
        raise BadRow(f"{name} must be true or false, 1 or 0, got {value!r:.60}")
    return word in TRUE


def _list(fields: dict, name: str) -> list:
    value = fields.get(name)
    if isinstance(value, str):  # a list inside a .csv file
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise BadRow(f"{name} is not a list: {value!r:.60}") from None
    if not isinstance(value, list) or not value:
        raise BadRow(f"no {name}" if not value else f"{name} is not a list: {value!r:.60}")
    return value
