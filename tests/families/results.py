"""Results as lines of JSON: appended as they come, so that an interrupted run loses nothing. Later lines count."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from .cell import Cell


@dataclass(frozen=True)
class Result:
    """What the columns said of one row in one precision.

    Attributes:
        row, dtype: which.
        versions: of the libraries.
        source: of the source tree, `versions.source`.
        cells: by column.
        seconds: it took.
    """

    row: str
    dtype: str
    versions: dict[str, str]
    source: str
    cells: dict[str, Cell]
    seconds: float = 0.0

    @property
    def faults(self) -> dict[str, Cell]:
        return {name: cell for name, cell in self.cells.items() if cell.status == "no"}


class Results:
    """The results in a file.

    Args:
        path: of the JSON lines; made with its folder at the first result.
        versions: results of other versions of the libraries are kept in the file and not read.
    """

    def __init__(self, path: Path, versions: dict[str, str]):
        self.path, self.versions = path, versions
        self.found: dict[tuple[str, str], Result] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            if (result := _read(line)) is not None and result.versions == versions:
                self._put(result)

    def get(self, row: str, dtype: str) -> Result | None:
        return self.found.get((row, dtype))

    def add(self, result: Result) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        own = {**vars(result), "cells": {name: [cell.status, cell.reason] for name, cell in result.cells.items()}}
        with self.path.open("a") as file:
            file.write(json.dumps(own) + "\n")
        self._put(result)

    def _put(self, result: Result) -> None:
        self.found[result.row, result.dtype] = result


def _read(line: str) -> Result | None:
    """None for a line that was cut off."""
    try:
        own = json.loads(line)
    except json.JSONDecodeError:
        return None
    return Result(**{**own, "cells": {name: Cell(*cell) for name, cell in own["cells"].items()}})
