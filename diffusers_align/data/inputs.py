"""Columns that are more than plain values: arguments of the pipeline's call, one per sample (pictures, masks, frames, texts, numbers), and pictures that
rewards alone look at."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from .files import BadRow
from .images import LazyImage

FILMS = (".mp4", ".mov", ".mkv", ".avi", ".webm")


def parse_input_columns(words: Sequence[str]) -> dict[str, str]:
    """`["image", "mask_image=mask"]` as {argument of the call: column}.

    Raises:
        ValueError: an argument named twice or an empty name.
    """
    found: dict[str, str] = {}
    if not words:
        raise ValueError("--input_columns names no column. Example: --input_columns image mask_image=mask.")
    for word in words:
        argument, equals, column = (part.strip() for part in word.partition("="))
        if not argument or equals and not column:
            raise ValueError(f"--input_columns: {word!r} is neither COLUMN nor ARGUMENT=COLUMN. Example: --input_columns image mask_image=mask.")
        if argument in found:
            raise ValueError(f"--input_columns names {argument!r} twice.")
        found[argument] = column or argument
    return found


@dataclass(frozen=True)
class Inputs:
    """Which columns are arguments of the pipeline's call.

    Attributes:
        columns: {argument: column}.
        words: the arguments that take text. The others' strings are files.
        size: (height, width) that pictures are resized to when they are opened, as a data set's are; None leaves theirs.
        pictures: further columns that hold pictures, which rewards alone get.
    """

    columns: dict[str, str]
    words: frozenset[str] = frozenset()
    size: tuple[int, int] | None = None
    pictures: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.columns or self.pictures)

    def __str__(self) -> str:
        return ", ".join([*self.columns.values(), *self.pictures])

    def check_columns(self, there: Iterable[str], source: Any) -> None:
        """Raises ValueError where the data lack one of the columns."""
        for flag, columns in (("--input_columns", self.columns.values()), ("--picture_columns", self.pictures)):
            if missing := [column for column in columns if column not in there]:
                raise ValueError(f"{source} has no column {', '.join(map(repr, missing))} for {flag}. It has {', '.join(map(repr, there))}.")

    def of_row(self, row: dict, root: Path, changes: Counter, again: Callable[[], dict] | None = None) -> dict[str, Any]:
        """{argument: value}; pictures as `LazyImage`, each decoded once; what is done about them is counted in `changes`.

        Args:
            again: reads the row anew: pictures that stand in it as bytes need not stay in memory then.

        Raises:
            BadRow: a column is empty, or a picture cannot be read.
        """
        found = {}
        for argument, column in self.columns.items():
            value = self._value(argument, column, row.get(column), root, changes)
            if again is not None and isinstance(value, LazyImage) and isinstance(value.source, bytes):
                value = replace(value, source=lambda column=column: again()[column])
            found[argument] = value
        return found

    def pictures_of_row(self, row: dict, root: Path, changes: Counter) -> dict[str, Any]:
        """{column: value} of what rewards alone get, as `of_row` reads it; None where a row has none.

        Raises:
            BadRow: a picture cannot be read.
        """
        there = {column: row.get(column) for column in self.pictures}
        return {column: None if value in (None, "") else self._value(column, column, value, root, changes) for column, value in there.items()}

    def _value(self, argument: str, column: str, value: Any, root: Path, changes: Counter) -> Any:
        if value is None or isinstance(value, str) and not value.strip() and argument not in self.words:
            raise BadRow(f"no {column!r}, which --input_columns hands to the pipeline")
        if argument in self.words:
            return value
        if isinstance(value, (list, tuple)):
            return [self._value(argument, column, part, root, changes) for part in value]
        if isinstance(value, str) and column not in self.pictures and not os.path.isfile(root / value) and (number := _number(value)) is not None:
            return number
        if isinstance(value, str):
            value = {"path": value}
        if not isinstance(value, (dict, bytes, Image.Image)):
            return value  # numbers
        image = LazyImage(_source(value, column, root), fit=self.size)
        try:
            changes.update(image.check("full"))
        except BadRow as error:
            raise BadRow(f"{column!r} cannot be read: {error}") from error
        return image


def _number(text: str) -> int | float | None:
    """Of a .csv file, where all is text; None of what is no finite number."""
    for kind in (int, float):
        try:
            return number if math.isfinite(number := kind(text)) else None
        except ValueError:
            continue
    return None


def _source(value: Any, column: str, root: Path) -> Path | bytes | Image.Image:
    if not isinstance(value, dict):
        return value
    if value.get("bytes"):
        return value["bytes"]
    if not isinstance(value.get("path"), str):
        raise BadRow(f"{column!r} is an object without 'path' or 'bytes'")
    text = value["path"]
    if "://" in text:
        raise BadRow(f"{column!r} is a URL, {text:.80}: download the files first")
    if text.lower().endswith(FILMS):
        raise BadRow(f"{column!r} is a film, {text:.80}: give its frames, as a list of image files")
    if not (root / text).is_file():
        raise BadRow(f"{column!r}: no file {root / text}")
    return root / text


def opened(value: Any) -> Any:
    """A value of `Prompt.inputs` or `Prompt.columns` with its pictures read."""
    if isinstance(value, list):
        return [opened(part) for part in value]
    return value.open() if isinstance(value, LazyImage) else value


def key_of(inputs: dict[str, Any], content: bool = False) -> str:
    """What tells the inputs of one sample from another's: the pictures' files (`content`: what these hold) and sizes, and the plain values."""

    def key(value: Any) -> Any:
        if isinstance(value, list):
            return [key(part) for part in value]
        return (value.content_hash() if content else value.identity, value.fit) if isinstance(value, LazyImage) else value

    return repr([(name, key(value)) for name, value in sorted(inputs.items())]) if inputs else ""


def has_pictures(value: Any) -> bool:
    """Whether a value of `Prompt.inputs`, or any of a dict of them, is a picture or has one in it."""
    if isinstance(value, (dict, list)):
        return any(map(has_pictures, value.values() if isinstance(value, dict) else value))
    return isinstance(value, LazyImage)


def sizes_of(inputs: dict[str, Any]) -> tuple:
    """What must be equal for samples to share a batch: each picture's (width, height) and number."""

    def size(value: Any) -> Any:
        if isinstance(value, list):
            return tuple(size(part) for part in value)
        return value.size if isinstance(value, LazyImage) else None

    return tuple((name, size(value)) for name, value in sorted(inputs.items()))
