"""Two runs of a recipe, epoch by epoch: the same bits, within the band, or different, and where."""

from __future__ import annotations

import math
import platform
from dataclasses import dataclass

import diffusers
import torch

# Of a metric's spread over the committed curve: how far the mean of any third of the epochs may lie from that curve's, on another type of machine.
BAND = 0.25
# For metrics that hardly move: the same as a share of their size.
FLOOR = 0.02
PARTS = 3


def machine_type() -> dict[str, str]:
    """What decides the bits of a run on one thread of a CPU."""
    capability = torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__.split("+")[0], "diffusers": diffusers.__version__, "cpu": capability, "architecture": platform.machine()}


def columns(rows: list[dict]) -> dict[str, list[float | None]]:
    """Every metric of `metrics.jsonl` over the epochs; None where an epoch does not have it, or where it is NaN."""
    names = list(dict.fromkeys(name for row in rows for name in row if name != "epoch"))
    return {name: [None if (value := row.get(name)) is None or math.isnan(value) else value for row in rows] for name in names}


@dataclass(frozen=True)
class Difference:
    """What a metric does otherwise than the committed curve.

    Attributes:
        what: in words.
        share: of the band that is used up; infinite where the two cannot be compared.
    """

    metric: str
    what: str
    share: float


def compare(committed: dict[str, list], found: dict[str, list]) -> list[Difference]:
    """The metrics that are not the same to the last bit, the farthest first; none where all are."""
    differences = [Difference(name, "is no longer logged", math.inf) for name in committed if name not in found]
    differences += [Difference(name, "is logged, and the committed curve does not have it", math.inf) for name in found if name not in committed]
    for name in (name for name in committed if name in found):
        if (told := _metric(committed[name], found[name])) is not None:
            differences.append(Difference(name, *told))
    return sorted(differences, key=lambda difference: -difference.share)


def _metric(there: list, here: list) -> tuple[str, float] | None:
    if there == here:
        return None
    if len(there) != len(here):
        return f"has {len(here)} epochs, and the committed curve {len(there)}", math.inf
    first = next(i for i, pair in enumerate(zip(there, here)) if pair[0] != pair[1])
    told = f"from epoch {first} on: {_shown(there[first])} is committed, {_shown(here[first])} was logged"
    if any((a is None) != (b is None) for a, b in zip(there, here)):
        return f"{told}; an epoch has no number in one of the two", math.inf
    width, distance, part = _widest(there, here)
    share = distance / width if width else math.inf
    return f"{told}; the means of part {part + 1} of {PARTS} differ by {distance:.3g}, and the band is {width:.3g}", share


def _shown(value: float | None) -> str:
    return "no number" if value is None else f"{value:.9g}"


def _widest(there: list, here: list) -> tuple[float, float, int]:
    """The band, the largest distance of the means of a third, and which third that is. Epochs without a number count nowhere."""
    numbers = [value for value in there if value is not None]
    width = max(BAND * (max(numbers) - min(numbers)), FLOOR * sum(map(abs, numbers)) / len(numbers))
    parts = min(PARTS, len(there))
    distances = []
    for part in range(parts):
        pairs = [(a, b) for a, b in list(zip(there, here))[part * len(there) // parts : (part + 1) * len(there) // parts] if a is not None]
        distances.append(abs(sum(b - a for a, b in pairs)) / len(pairs) if pairs else 0.0)
    return width, max(distances), distances.index(max(distances))
