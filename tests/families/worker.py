"""One row in a process of its own. What takes seconds to import is imported once, by the server that the processes are forked from."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import Any

from .cell import NO, Cell


def preload() -> None:
    """Import what all rows need. One thread: small models lose more to threads than they gain, and only a single one survives a fork."""
    import torch

    torch.set_num_threads(1)
    from . import cases, columns  # noqa: F401


def survey(connection: Any) -> None:
    """Send (rows, what was left out, names that diffusers does not export, and the versions with the source's name)."""
    from .cases import ABSENT, CASES
    from .exported import exported, rows, stale
    from .versions import source, versions

    classes, left_out = exported()
    connection.send((rows(classes, CASES, ABSENT), left_out, stale(classes, left_out, CASES, ABSENT), versions(), source()))


def look_at(connection: Any, cls: str, index: int, dtype: str, wanted: set[str] | None, show: bool) -> None:
    """Send (column, cell) for each column of a case as soon as it is known, after (column, None) when it is begun.

    Args:
        dtype: the name of torch's.
        wanted: names of columns; all of those that are for this precision if absent.
        show: print the tracebacks.
    """
    _quiet()
    import torch

    from .cases import CASES
    from .column import look
    from .columns import COLUMNS
    from .subject import Subject

    torch.set_num_threads(1)
    columns = COLUMNS if dtype == "float32" else tuple(column for column in COLUMNS if column.half)
    subject = Subject(CASES[cls][index], getattr(torch, dtype))
    for name, cell in look(subject, columns, wanted, begin=lambda name: connection.send((name, None)), show=show):
        connection.send((name, cell))


def _quiet() -> None:
    import logging
    import warnings

    import diffusers
    import transformers

    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def guarded(task: Callable, connection: Any, *arguments: Any) -> None:
    """Run `task(connection, ...)`; what it raises is sent as a fault, with its traceback on the error stream."""
    try:
        task(connection, *arguments)
    except BaseException as error:
        traceback.print_exc(file=sys.stderr)
        connection.send(("", Cell(NO, f"{type(error).__name__}: {error}")))
    finally:
        connection.close()
