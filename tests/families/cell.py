"""What a column says of a pipeline."""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
YES, NO, REFUSED, OUTSIDE, UNREACHED = "yes", "no", "refused", "outside", "unreached"
STATUSES = {
    YES: "yes",
    NO: "no: a fault",
    REFUSED: "refused with a sentence",
    OUTSIDE: "does not apply",
    UNREACHED: "not reached: a column that it builds on is not green",
}
# These raise ValueErrors of ours, which say that a replay is of other samples: a fault here, wherever they come from.
_FOUND_OUT = {"check_state", "check_first_steps"}


@dataclass(frozen=True)
class Cell:
    """One column's answer for one pipeline.

    Attributes:
        status: a key of `STATUSES`.
        reason: one line; of a green cell a remark, or nothing.
    """

    status: str
    reason: str = ""

    @property
    def green(self) -> bool:
        """Whether this is what the library promises: it works, or says what to do, or there is nothing to do."""
        return self.status in (YES, REFUSED, OUTSIDE)


class Fault(Exception):
    """A column found that a promise does not hold."""


class DoesNotApply(Exception):
    """The pipeline has nothing that the column could look at."""


def require(holds: bool, otherwise: str) -> None:
    """Raise a `Fault` with the sentence `otherwise` unless `holds`."""
    if not holds:
        raise Fault(otherwise)


def looked_at(check: Callable[[], str | None], show: bool = False) -> Cell:
    """The cell of what `check()` returns (nothing, or a remark) or raises; with `show`, tracebacks are printed."""
    try:
        return Cell(YES, check() or "")
    except DoesNotApply as reason:
        return Cell(OUTSIDE, str(reason))
    except Fault as reason:
        return Cell(NO, str(reason))
    except Exception as error:
        if show:
            traceback.print_exception(error)
        return _of_exception(error)


def _of_exception(error: Exception) -> Cell:
    frames = traceback.extract_tb(error.__traceback__)
    sentence = " ".join((str(error) or "no message").split())
    if _ours(frames[-1].filename) and isinstance(error, (ValueError, TypeError)) and _is_raised(frames[-1]) and not {f.name for f in frames} & _FOUND_OUT:
        return Cell(REFUSED, sentence)
    inside = [frame for frame in frames if _ours(frame.filename)]
    places = dict.fromkeys(map(_place, [frames[-1], *inside[-1:]]))
    return Cell(NO, f"{type(error).__name__}: {sentence[:300]} ({' < '.join(places)})")


def _ours(filename: str) -> bool:
    return Path(filename).is_relative_to(ROOT / "diffusers_align")


def _is_raised(frame: traceback.FrameSummary) -> bool:
    """Whether the error was made on purpose, by a `raise`; others come from operations."""
    return linecache.getline(frame.filename, frame.lineno).strip().startswith("raise ")


def _place(frame: traceback.FrameSummary) -> str:
    """The file from its package on, and the line."""
    path = Path(frame.filename)
    parts = path.relative_to(ROOT).parts if path.is_relative_to(ROOT) and ".venv" not in path.parts else path.parts
    if "site-packages" in parts:
        parts = parts[parts.index("site-packages") + 1 :]
    return f"{'/'.join(parts[-4:])}:{frame.lineno}"
