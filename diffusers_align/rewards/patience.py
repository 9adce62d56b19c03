"""Waiting for what may never come."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any


class OverTime(Exception):
    """A function took longer than it may; its argument is the future that may still answer."""


def within(seconds: float | None, function: Callable[[], Any]) -> Any:
    """`function()`, or OverTime after so many seconds; its thread is then left behind, and dies with the process."""
    if seconds is None:
        return function()
    future: Future = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True, name="reward").start()
    if not wait([future], seconds).done:
        raise OverTime(future)
    return future.result()
