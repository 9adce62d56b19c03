"""The five kinds of preference data and the checks that a row passes."""

from __future__ import annotations

import json
import math
from typing import Any

from .files import BadRow

KINDS = {
    "captioned": ("prompt", "image"),
    "pair": ("prompt", "image_0", "image_1", "label_0"),
    "binary": ("prompt", "image", "label"),
    "scored": ("prompt", "image", "reward"),
    "ranked": ("prompt", "images", "ranks"),
}
TRUE, FALSE = {"true", "yes", "1", "1.0"}, {"false", "no", "0", "0.0"}


class LeftOut(Exception):
    """A sound row that says nothing about preferences; the message is the heading it is counted under."""


def canonical(kind: str, fields: dict) -> dict:
    """The columns of `KINDS[kind]` from fields of those names, in their own types; pairs have a `weight` besides.

    Raises:
        BadRow: a field is missing, empty, not a number, or outside its range.
        LeftOut: the row has no label.
    """
    row: dict[str, Any] = {"prompt": text_of(fields.get("prompt"))}
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


def text_of(value: object) -> str:
    """A prompt without the blanks around it.

    Raises:
        BadRow: it is empty, no text, or holds half of a surrogate pair, which no tokenizer takes.
    """
    if not isinstance(value, str) or not value.strip():
        raise BadRow("the prompt is empty" if value is None or isinstance(value, str) else f"the prompt is no text: {value!r:.60}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise BadRow(f"the prompt holds half of a surrogate pair, a character cut in two: {value!r:.60}")
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


def parsed(value: Any) -> Any:
    """What a text of a .csv file holds: a list, an object or a number as JSON, or the text itself; other values as they are."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _list(fields: dict, name: str) -> list:
    value = parsed(fields.get(name))
    if not isinstance(value, list) or not value:
        raise BadRow(f"no {name}" if not value else f"{name} is not a list: {value!r:.60}")
    return value
