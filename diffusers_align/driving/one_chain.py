"""Whether a pipeline's scheduler walks one chain of states, each the whole sample: what can be learned on, steered by and decoded."""

from __future__ import annotations

import dis
import functools
from collections.abc import Callable
from types import CodeType

from .calls import Calls
from .replacements import reads_global


def check_whole_steps(calls: Calls) -> None:
    """Raise a ValueError if the code of a pipeline's call says that its scheduler does not step the whole sample at a time, and what it does instead."""
    _check(calls, _PARTLY)


def check_one_chain(calls: Calls) -> None:
    """The same, and if the steps are several chains: then the final states of all of them are the sample, and best-of-n is left."""
    _check(calls, _PARTLY | _AGAIN)


def _check(calls: Calls, ways: dict[str, Callable[[CodeType], bool]]) -> None:
    for function in calls.functions:
        if why := next((why for why, holds in ways.items() if holds(function.__code__)), None):
            raise ValueError(f"{calls.name} {why}")


@functools.cache
def _puts_back(code: CodeType) -> bool:
    return reads_global(code, "__dict__") and reads_global(code, "deepcopy")


@functools.cache
def _steps_many(code: CodeType) -> bool:
    return reads_global(code, "batch_step_no_noise")


@functools.cache
def _puts_another(code: CodeType) -> bool:
    stores = (line for line in dis.get_instructions(code) if line.opname == "STORE_ATTR" and line.argval == "scheduler")
    return reads_global(code, "deepcopy") and any(stores)


_NO_CHAIN = (
    "so that there is no one chain of states to learn on, to steer by or to choose from. Use a pipeline that steps its whole samples one time after the other."
)
_PARTLY = {
    f"takes its scheduler's state out and puts it back (`scheduler.__dict__`), to step one window of the sample after the other, {_NO_CHAIN}": _puts_back,
    f"steps many times at once (`scheduler.batch_step_no_noise`) and goes back where they do not fit, {_NO_CHAIN}": _steps_many,
}
_AGAIN = {
    "puts a copy of its scheduler in that one's place half-way, to go on from an earlier step with other samples, so that there is no one chain of states to "
    "learn on or to steer by. Choose the best of n, which keeps the end of each: BestOfNPipeline(pipe).": _puts_another
}
