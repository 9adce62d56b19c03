"""What was green before: a small file in the repository, against which a run is compared."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from .cell import NO, OUTSIDE, REFUSED, UNREACHED, YES
from .results import Result

PATH = Path(__file__).with_name("expected.json")
LETTERS = {YES: "y", REFUSED: "r", OUTSIDE: "o", NO: "n", UNREACHED: "u"}
STATUS_OF = {letter: status for status, letter in LETTERS.items()}


def write(results: Iterable[Result], versions: dict[str, str], path: Path = PATH) -> None:
    """A line for each row, with a letter for each of its columns; rows of other precisions behind one another."""
    results = list(results)
    columns = {result.dtype: [] for result in results}
    for result in results:
        columns[result.dtype] += [name for name in result.cells if name not in columns[result.dtype]]
    lines = [f'  "{name}": {json.dumps(value)},' for name, value in (("versions", versions), ("columns", columns))]
    for result in sorted(results, key=lambda result: (result.dtype, result.row)):
        letters = "".join(LETTERS[result.cells[name].status] if name in result.cells else "u" for name in columns[result.dtype])
        lines.append(f'  "{result.dtype} {result.row}": "{letters}",')
    path.write_text("{\n" + "\n".join(lines).removesuffix(",") + "\n}\n")


def read(path: Path = PATH) -> tuple[dict[tuple[str, str], dict[str, str]], dict[str, str]]:
    """The statuses by column of each (row, dtype), and the versions that they are of."""
    if not path.exists():
        return {}, {}
    own = json.loads(path.read_text())
    versions, columns = own.pop("versions"), own.pop("columns")
    found = {}
    for key, letters in own.items():
        dtype, row = key.split(" ", 1)
        found[row, dtype] = {name: STATUS_OF[letter] for name, letter in zip(columns[dtype], letters)}
    return found, versions


def regressions(results: Iterable[Result], before: dict[tuple[str, str], dict[str, str]]) -> list[tuple[Result, str, str]]:
    """(result, column, what it was) wherever it was green and is not now, or worked and is refused now."""
    found = []
    for result in results:
        for name, was in before.get((result.row, result.dtype), {}).items():
            cell = result.cells.get(name)
            if cell is not None and (was == YES and cell.status != YES or was in (REFUSED, OUTSIDE) and not cell.green):
                found.append((result, name, was))
    return found
