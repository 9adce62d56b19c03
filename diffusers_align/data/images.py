"""Images that are read when asked for: upright, in sRGB, on white, one frame, in bounded memory; and what was changed to make them so."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from .files import BadRow

# What Pillow warns from (it refuses twice as many): larger files are decoded at half their size, as JPEG can be, or are bad rows.
MAX_PIXELS = 89_478_485
HALVED = "decoded at half its size"
TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange height and width
EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True, eq=False)
class LazyImage:
    """An image that costs no memory until it is opened.

    Args:
        source: a path, an image file's bytes, a PIL image, or a function that returns one of them.
        uid: what the data set calls the image, where it does.
        fit: (height, width) that it is resized to, aspect kept, the overhang cropped; None leaves its size.
    """

    source: Path | bytes | Image.Image | Callable[[], Any]
    uid: str | None = None
    fit: tuple[int, int] | None = None

    def _load(self) -> Path | bytes | Image.Image:
        value = self.source
        if callable(value):
            value = value()
        if isinstance(value, dict):
            value = value["bytes"] or Path(value["path"])
        return value

    def open(self) -> Image.Image:
        """The image in RGB, as sRGB by its ICC profile, upright as its EXIF tag says, on white where it is transparent; of an animation the
        first frame.

        Raises:
            OSError: the file is missing, truncated or no image.
            BadRow: its pixels have no known range, or are too many.
        """
        with _decoder(self._load()) as image:
            turned = image.getexif().get(EXIF_ORIENTATION, 1) != 1  # else `exif_transpose` makes a copy for nothing
            image = in_srgb(ImageOps.exif_transpose(image) if turned else image)
        return image if self.fit is None else covered(image, *self.fit)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of what `open` returns, from the file's header."""
        if self.fit is not None:
            return self.fit[::-1]
        with _decoder(self._load()) as image:
            return image.size[::-1] if image.getexif().get(EXIF_ORIENTATION) in TURNED else image.size

    def check(self, verify: str) -> list[str]:
        """Decode the image (`verify="full"`), or read its header only (`"header"`). Returns what `open` changes about it, in words.

        Raises:
            BadRow: that cannot be done, the pixels have no known range, or there are too many.
        """
        try:
            with _decoder(self._load()) as image:
                if verify == "full":
                    image.load()
                return changes(image)
        except BadRow:
            raise
        except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error and more on broken files
            raise BadRow(f"{type(error).__name__}: {error}") from error

    def fitted(self, size: tuple[int, int] | None) -> LazyImage:
        """The same, resized to (height, width) when it is opened."""
        return replace(self, fit=size)

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


@contextmanager
def _decoder(value: Path | bytes | Image.Image) -> Iterator[Image.Image]:
    """The file's first frame, not decoded yet; closed afterwards."""
    if isinstance(value, Image.Image):
        yield _checked(value.copy())
        return
    with io.BytesIO(value) if isinstance(value, bytes) else value.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with _identified(file) as image:
            if image.width * image.height > MAX_PIXELS and image.draft(None, (image.width // 2, image.height // 2)):
                image.info[HALVED] = True
            yield _checked(image)


def _identified(file: BinaryIO) -> Image.Image:
    try:
        return Image.open(file)
    except UnidentifiedImageError:
        file.seek(0)
        head = file.read(24)
        raise UnidentifiedImageError(f"the file begins with {head!r}, as no image that is known" if head else "the file is empty") from None


def _checked(image: Image.Image) -> Image.Image:
    """Raises BadRow where it is not known what the largest pixel means (float images, integers of 32 bits), or memory is at risk."""
    if image.mode == "F" or image.mode == "I" and image.format != "PNG":  # as 16-bit PNG files come in some versions of Pillow
        raise BadRow(f"its pixels (mode {image.mode}) have no known range: save it with 8 or 16 bits a channel")
    if image.width * image.height > MAX_PIXELS:
        raise BadRow(f"{image.width} x {image.height} are more than {MAX_PIXELS // 10**6} million pixels: make it smaller")
    return image


def in_srgb(image: Image.Image) -> Image.Image:
    """Any image in RGB as sRGB: by its ICC profile where that can be used, 16 bits as 8, on white where it is transparent."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I"):  # of 16 bits, which `convert` would cut off at 255
        image = image.convert("I").point(lambda value: value * (255 / 65535) + 0.5).convert("L")
    alpha = None
    if _transparent(image):
        image, alpha = _without_alpha(image)
    elif image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("RGB")
    transform = _transform(profile, image.mode) if profile else None
    image = ImageCms.applyTransform(image, transform) if isinstance(transform, ImageCms.ImageCmsTransform) else image.convert("RGB")
    if alpha is not None:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), Image.merge("RGBA", (*image.split(), alpha))).convert("RGB")
    return image


def _transparent(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _without_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image]:
    """Its colours (a grey one stays grey, for its profile) and its opacity."""
    whole = image.convert("RGBA")
    return (image.getchannel("L") if image.mode == "LA" else image if image.mode == "L" else whole.convert("RGB")), whole.getchannel("A")


def changes(image: Image.Image) -> list[str]:
    """What `LazyImage.open` does about a file beyond decoding it, as the end of "3 images ..."."""
    found = []
    if image.info.get("icc_profile"):
        transform = _transform(image.info["icc_profile"], _colour_mode(image))
        if isinstance(transform, str):
            found.append(f"have an ICC profile that cannot be used ({transform}) and are read as sRGB")
        elif transform is not None:
            found.append("are converted from their ICC profile to sRGB")
    elif image.mode == "CMYK":
        found.append("are CMYK without an ICC profile and are converted without colour management")
    if getattr(image, "is_animated", False):
        found.append("have several frames, of which the first is taken")
    # of a PNG file whose header has no EXIF data, `getexif` would decode the pixels to look behind them
    if ("exif" in image.info or image.format != "PNG") and image.getexif().get(EXIF_ORIENTATION, 1) != 1:
        found.append("are turned upright as their EXIF tag says")
    if _transparent(image):
        found.append("are transparent and laid on white")
    if HALVED in image.info:
        found.append(f"have more than {MAX_PIXELS // 10**6} million pixels and are decoded at half their size")
    if image.mode.startswith("I"):
        found.append("have 16 bits and are rounded to 8")
    return found


def _colour_mode(image: Image.Image) -> str:
    """The mode in which `in_srgb` applies a profile."""
    if image.mode in ("LA", "La") or image.mode.startswith("I"):
        return "L"
    return "L" if image.mode == "L" else "CMYK" if image.mode == "CMYK" and not _transparent(image) else "RGB"


@lru_cache(maxsize=64)
def _transform(profile: bytes, mode: Literal["RGB", "L", "CMYK"]) -> ImageCms.ImageCmsTransform | str | None:
    """From an ICC profile to sRGB; None where that changes nothing, and the reason where the profile cannot be used."""
    try:
        source, target = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
        options = {"renderingIntent": ImageCms.Intent.RELATIVE_COLORIMETRIC, "flags": ImageCms.Flags.BLACKPOINTCOMPENSATION}
        transform = ImageCms.buildTransform(source, target, mode, "RGB", **options)
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError) as error:
        return str(error).strip() or type(error).__name__
    if mode != "CMYK":
        levels = np.arange(0, 256, 15, dtype=np.uint8)  # 18 of them
        cube = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(18, -1, 3) if mode == "RGB" else levels[None]
        before = Image.fromarray(cube)
        if np.abs(np.asarray(ImageCms.applyTransform(before, transform), int) - np.asarray(before.convert("RGB"), int)).max() <= 2:
            return None
    return transform


def covered(image: Image.Image, height: int, width: int, top: float = 0.5, left: float = 0.5) -> Image.Image:
    """Resized to cover that size (Lanczos, aspect kept) and cropped; `top` and `left` are fractions of the overhang."""
    scale = max(height / image.height, width / image.width)
    # the part of the original that becomes the crop, resampled in one go
    part_width, part_height = width / scale, height / scale
    x, y = left * (image.width - part_width), top * (image.height - part_height)
    box = (max(x, 0.0), max(y, 0.0), min(x + part_width, image.width), min(y + part_height, image.height))
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)
