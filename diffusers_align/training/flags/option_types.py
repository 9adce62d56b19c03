"""What a field's annotation says about its flag: how many words it takes, what they may be, and that in words."""

from __future__ import annotations

import json
import os
import types
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, GroupedMetadata, Gt, Le, Lt
from pydantic.fields import FieldInfo

NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text that is not empty", dict: "a JSON object"}


@dataclass(frozen=True)
class Kind:
    """The type of a flag.

    Attributes:
        type: of one value: int, float, bool, str or dict.
        bounds: `Ge`, `Gt`, `Le`, `Lt` of a number.
        choices: the texts that it may be, if only some may.
        length: None for one value, 0 for a list of one or more, n for exactly n.
        optional: whether it may be absent.
        may_be_empty: of a text.
    """

    type: type
    bounds: tuple[Any, ...] = ()
    choices: tuple[str, ...] = ()
    length: int | None = None
    optional: bool = False
    may_be_empty: bool = False

    @property
    def is_flag(self) -> bool:
        """`--flag` and `--no-flag`, without a value."""
        return self.type is bool and self.length is None

    @property
    def is_number(self) -> bool:
        """Whether its values have a range."""
        return self.type in (int, float)

    @property
    def nargs(self) -> str | int | None:
        """argparse's."""
        return {None: None, 0: "+"}.get(self.length, self.length)

    def metavar(self, name: str) -> str:
        """What stands for a value in the help."""
        return f"{{{','.join(self.choices)}}}" if self.choices else {int: "N", float: "X", dict: "JSON"}.get(self.type, name.upper())

    @property
    def range(self) -> str:
        """What a number, or one of several, may be; empty for texts, objects and switches."""
        if self.choices or not self.is_number:
            return ""
        several = {None: "", 0: "one or more, each "}.get(self.length, f"{self.length} values, each ")
        return several + f"{NAMES[self.type]} {_between(self.bounds)}".strip()

    @property
    def describe(self) -> str:
        """The same for any type, to stand after "must be"."""
        one = f"one of {', '.join(self.choices)}" if self.choices else self.range or ("text" if self.may_be_empty else NAMES[self.type])
        return f"one or more, each {one}" if self.length == 0 and not self.is_number else one

    def __contains__(self, value: float) -> bool:
        """Whether the declared range contains a number."""
        tests = {Ge: lambda b: value >= b.ge, Gt: lambda b: value > b.gt, Le: lambda b: value <= b.le, Lt: lambda b: value < b.lt}
        return all(tests[type(bound)](bound) for bound in self.bounds)

    def prepared(self, value: Any) -> Any:
        """A value as pydantic takes it: a list where one is wanted, an object where its JSON was given.

        Raises:
            ValueError: it is not what the flag takes.
        """
        if self.length is not None:
            items = value if isinstance(value, (list, tuple)) else value if value is None else [value]
            return items if items is None else [self._one(item) for item in items]
        return self._one(value)

    def _one(self, value: Any) -> Any:
        if isinstance(value, bool) and self.type is not bool:
            if value is False and "no" in self.choices:
                return "no"  # which YAML 1.1 reads as false
            raise ValueError(f"must be {self.describe}" + (", in quotes where it is a word that YAML reads as true or false" if self.type is str else ""))
        if self.type is bool and not (isinstance(value, bool) or (value is None and self.optional)):
            raise ValueError("must be true or false" + (", without quotes" if isinstance(value, str) else ""))
        if self.type is str and not self.choices and isinstance(value, list):
            return ",".join(map(str, value))
        if self.type is str and not self.choices and isinstance(value, str):
            return os.path.expanduser(value)  # a path in a recipe, or after "=", which no shell expands
        return _json_object(value) if self.type is dict and isinstance(value, str) else value


def kind_of(annotation: Any, metadata: Iterable[Any] = ()) -> Kind:
    """The kind of a field, from its annotation and its metadata."""
    found: dict[str, Any] = {"bounds": _bounds(metadata), "may_be_empty": _may_be_empty(metadata)}
    while True:
        origin, inner = get_origin(annotation), get_args(annotation)
        if origin is Annotated:
            annotation, found["bounds"] = inner[0], found["bounds"] + _bounds(inner[1:])
            found["may_be_empty"] |= _may_be_empty(inner[1:])
        elif origin in (Union, types.UnionType):
            (annotation,), found["optional"] = [a for a in inner if a is not type(None)], True
        elif origin in (list, tuple):
            found["length"] = 0 if origin is list else len(inner)
            annotation = inner[0]
        elif origin is Literal:
            return Kind(type=str, choices=inner, **found)
        else:
            return Kind(type=origin or annotation, **found)


def _bounds(metadata: Iterable[Any]) -> tuple[Any, ...]:
    bounds: list[Any] = []
    for item in metadata:
        parts = item.metadata if isinstance(item, FieldInfo) else item if isinstance(item, GroupedMetadata) else [item]
        bounds += [part for part in parts if isinstance(part, (Ge, Gt, Le, Lt))]
    return tuple(bounds)


def _may_be_empty(metadata: Iterable[Any]) -> bool:
    return any(getattr(item, "min_length", None) == 0 for item in metadata)


def _between(bounds: tuple[Any, ...]) -> str:
    said = {type(bound): bound for bound in bounds}
    low = f"at least {_short(said[Ge].ge)}" if Ge in said else f"above {_short(said[Gt].gt)}" if Gt in said else ""
    high = f"at most {_short(said[Le].le)}" if Le in said else f"below {_short(said[Lt].lt)}" if Lt in said else ""
    if Ge in said and Le in said:
        return f"from {_short(said[Ge].ge)} to {_short(said[Le].le)}"
    return f"{low} and {high}" if low and high else low or high


def _short(number: float) -> str:
    """1e9 for 1000000000, 4294967295 as it is."""
    text = f"{number:.12g}"
    return f"{number:.0e}".replace("e+0", "e") if text.rstrip("0") in ("1", "-1") and abs(number) >= 1e5 else text


def _json_object(text: str) -> Any:
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except ValueError as error:
        raise ValueError(f"must be a JSON object ({error})") from error
    if not isinstance(value, dict):
        raise ValueError("must be a JSON object")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")
