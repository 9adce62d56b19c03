"""Prompts: from a file or from the sets that ship with the package, and which of them an epoch samples."""

from __future__ import annotations

import csv
import json
import random
from dataclasses import dataclass, field
from pathlib import Path

_SHIPPED = Path(__file__).parent / "prompts"
SUFFIXES = (".txt", ".jsonl", ".csv")
REWARD_ARGUMENTS = ("images", "prompts", "self")


@dataclass(frozen=True)
class Prompt:
    """A prompt and the data set's other fields, which rewards get as keyword arguments."""

    text: str
    columns: dict = field(default_factory=dict)


def shipped_sets() -> list[str]:
    """Names of the sets that `load_prompts` knows."""
    return sorted(path.stem for path in _SHIPPED.iterdir() if path.suffix in SUFFIXES)


def load_prompts(source: str, column: str = "prompt") -> list[Prompt]:
    """Read prompts from a `.txt` file (one a line), a `.jsonl` or a `.csv` file (field `column`), or a set of the package.

    Raises:
        ValueError: no such file or set, no prompts in it, a row without a prompt, or a field with the name of an argument of every reward
            (the message names the row).
    """
    path = Path(source)
    if not path.suffix and source in shipped_sets():
        path = next(_SHIPPED.glob(f"{source}.*"))
    if not path.is_file():
        raise ValueError(f"No prompt file {source!r}, and no shipped set of that name: there are {', '.join(shipped_sets())}.")
    if path.suffix == ".txt":
        prompts = [Prompt(line.strip()) for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    elif path.suffix in (".jsonl", ".csv"):
        prompts = [_from_row(row, number, column, path) for number, row in enumerate(_rows(path), 1)]
    else:
        raise ValueError(f"{path} is not a .txt, .jsonl or .csv file.")
    if not prompts:
        raise ValueError(f"{path} holds no prompts. Write one a line.")
    return prompts


def _rows(path: Path) -> list:
    # utf-8-sig: spreadsheet programs put a byte order mark before the first column's name
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":
            return list(csv.DictReader(file))
        return [_json_row(line) for line in file if line.strip()]


def _json_row(line: str) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return line


def _from_row(row: object, number: int, column: str, path: Path) -> Prompt:
    if not isinstance(row, dict):
        raise ValueError(f"{path}, row {number}: not a JSON object: {str(row).strip()[:80]!r}.")
    if None in row:  # where csv puts what has no column
        raise ValueError(f"{path}, row {number}: more fields than columns: {row[None]}. Quote texts that hold a comma.")
    text = str(row.get(column) or "").strip()
    if not text:
        raise ValueError(f"{path}, row {number}: no {column!r} among its fields {sorted(row)}. Name the right one with --prompt_column.")
    for name in REWARD_ARGUMENTS:
        if name in row and name != column:
            raise ValueError(f"{path}, row {number}: the field {name!r} would reach rewards by keyword, whose own argument is called so: rename or remove it.")
    return Prompt(text, {name: value for name, value in row.items() if name != column})


def prompts_of_epoch(prompts: list[Prompt], number: int, seed: int, epoch: int) -> list[int]:
    """Indices of the `number` prompts that an epoch samples: walks through seeded permutations, so each is seen equally often.

    A function of its arguments alone: it depends on neither the number of processes nor what was drawn before.
    """
    start, chosen = epoch * number, []
    for position in range(start, start + number):
        cycle, offset = divmod(position, len(prompts))
        order = random.Random(f"{seed}/{cycle}").sample(range(len(prompts)), len(prompts))
        chosen.append(order[offset])
    return chosen
