"""What an argument may be, declared in its annotation and checked in one place.

```python
@checked
def search(prompt: str, *, num_candidates: Count = 4, cosine: Probability = 0.95, kind: Literal["random", "zero_order"] = "random"): ...
```

`checked` refuses, with one sentence that names the argument, its range and the value: numbers that are not finite or out of range, numbers
where whole ones are wanted, texts for numbers and switches, names that are not among the choices; and anything else for a tensor, or for a class
that says how one gets it, in its attribute `made_by`. Annotations of other types say nothing here. The standard library alone, so that every
part of the package may use it.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
import types
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Function = TypeVar("Function", bound=Callable)


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, without `low` itself if `above`; finite, unless `infinite` allows what lies within."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    infinite: bool = False

    def __contains__(self, value: float) -> bool:
        inside = (self.low < value if self.above else self.low <= value) and value <= self.high
        return inside and (self.infinite or math.isfinite(value))

    def __str__(self) -> str:
        low = "" if self.low == -math.inf else f"{'above' if self.above else 'at least'} {self.low:g}"
        if self.high == math.inf:
            return low
        return f"from {self.low:g} to {self.high:g}" if low and not self.above else f"{low} and at most {self.high:g}".removeprefix(" and ")


Count = Annotated[int, Range(1)]
CountOrNone = Annotated[int, Range(0)]
NonNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, above=True)]
PositiveOrInfinite = Annotated[float, Range(0, above=True, infinite=True)]
Probability = Annotated[float, Range(0, 1)]
PositiveShare = Annotated[float, Range(0, 1, above=True)]


def checked(function: Function) -> Function:
    """A function whose arguments are checked against their annotations at each call.

    Raises:
        TypeError, ValueError: an argument that its annotation does not allow; from the function.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any):
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:
            return function(*args, **kwargs)  # which says what is wrong in Python's own words
        check(_hints(inspect.unwrap(function)), given)
        return function(*args, **kwargs)

    return wrapper


def check_fields(instance: Any) -> None:
    """Check the fields of a dataclass against their annotations, from its `__post_init__`.

    Raises:
        ValueError: a field that its annotation does not allow.
    """
    check(_hints(type(instance)), {field.name: getattr(instance, field.name) for field in fields(instance)})


def check(annotations: dict[str, Any], values: dict[str, Any]) -> None:
    """Check the values that are given against the annotations of the same names.

    Raises:
        ValueError: a value that is not allowed.
    """
    for name, value in values.items():
        if name in annotations:
            check_value(name, value, annotations[name])


def check_value(name: str, value: Any, annotation: Any) -> None:
    """Check one value.

    Raises:
        TypeError: it is none of the class that is asked for.
        ValueError: it is not allowed.
    """
    kind, found, optional = _parts(annotation)
    if value is None and optional:
        return
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(f"Unknown {name} {value!r}; choose one of {', '.join(map(str, get_args(kind)))}.")
    elif kind is bool:
        if not isinstance(value, bool) and type(value).__name__ not in ("bool_", "bool"):
            raise ValueError(f"{name} must be True or False, got {value!r}.")
    elif kind in (int, float) and _number(value, kind) not in (found or Range()):
        allowed = str(found or "")
        words = "a whole number" if kind is int else "a number" if found is not None and found.infinite else "a finite number"
        raise ValueError(f"{name} must be {words}{allowed and f', {allowed}'}{', or None' if optional else ''}, got {value!r}.")
    elif (hasattr(kind, "made_by") or getattr(kind, "__name__", None) == "Tensor") and not isinstance(value, kind):
        how = f": {kind.made_by}" if hasattr(kind, "made_by") else ""
        raise TypeError(f"{name} must be a {kind.__name__}{', or None' if optional else ''}, got a {type(value).__name__}{how}.")


def check_call(arguments: dict[str, Any]) -> None:
    """Check the numbers among the arguments of a stock pipeline's call: finite, and counts of steps, pixels, frames and outputs at least 1.

    Pipelines take 0 steps, NaN or a negative size without a word, and return noise, black pictures or errors from deep inside.

    Raises:
        ValueError: a number that makes no sense.
    """
    for name, value in arguments.items():
        if name in _STOCK_COUNTS:
            check_value(name, value, Count | None)
        elif name == "strength":
            check_value(name, value, PositiveShare | None)
        elif isinstance(value, float):
            check_value(name, value, float)


# Arguments of stock calls that count something.
_STOCK_COUNTS = {
    "num_inference_steps", "prior_num_inference_steps", "decoder_num_inference_steps", "height", "width", "num_frames", "max_sequence_length",
    "num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt", "batch_size", "decode_chunk_size",
}  # fmt: skip


@functools.cache
def _hints(owner: Any) -> dict[str, Any]:
    return get_type_hints(owner, include_extras=True)


def _parts(annotation: Any) -> tuple[Any, Range | None, bool]:
    """The type, its range, and whether None is allowed."""
    optional, found = False, None
    while True:
        origin, inner = get_origin(annotation), get_args(annotation)
        if origin is Annotated:
            found = next((item for item in inner[1:] if isinstance(item, Range)), found)
            annotation = inner[0]
        elif origin in (Union, types.UnionType):
            others = [part for part in inner if part is not type(None)]
            optional = optional or len(others) < len(inner)
            if len(others) > 1:
                return None, None, optional
            annotation = others[0]
        else:
            return annotation, found, optional


def _number(value: Any, kind: type) -> float:
    """The value as a number of this kind; NaN, which no range contains, if it is none."""
    if isinstance(value, (bool, str, bytes)):
        return math.nan
    try:
        return operator.index(value) if kind is int else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return math.nan
