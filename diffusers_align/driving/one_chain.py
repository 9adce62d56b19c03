"""Whether a pipeline's scheduler walks one chain of states, each the whole sample: what can be learned on, steered by and decoded."""

from __future__ import annotations

import dis
import functools
from collections.abc import Callable
from types import CodeType

from .calls import Calls
from .replacements import reads_global

_BUT = (
    "{} {}, so that there is no one chain of states to learn on, to steer by or to choose from. Use a pipeline that steps its whole samples one time after the "
    "other."
)


def check_one_chain(calls: Calls) -> None:
    """Raise a ValueError if the code of a pipeline's call says that its scheduler's steps are no such chain, and what they are instead."""
    if why := next(filter(None, (_why_not(function.__code__) for function in calls.functions)), None):
        raise ValueError(_BUT.format(calls.name, why))


@functools.cache
def _why_not(code: CodeType) -> str | None:
    return next((why for why, holds in _WAYS.items() if holds(code)), None)


def _puts_another(code: CodeType) -> bool:
    stores = (line for line in dis.get_instructions(code) if line.opname == "STORE_ATTR" and line.argval == "scheduler")
    return reads_global(code, "deepcopy") and any(stores)


_WAYS: dict[str, Callable[[CodeType], bool]] = {
    "takes its scheduler's state out and puts it back (`scheduler.__dict__`), to step one window of the sample after the other": (
        lambda code: reads_global(code, "__dict__") and reads_global(code, "deepcopy")
    ),
    "puts a copy of its scheduler in that one's place half-way, to go on from an earlier step with other samples": _puts_another,
    "steps many times at once (`scheduler.batch_step_no_noise`) and goes back where they do not fit": lambda code: reads_global(code, "batch_step_no_noise"),
}
