"""Prompts: from a file or from the sets that ship with the package, and which of them an epoch samples."""

from __future__ import annotations

import difflib
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from .files import NO_FIELDS, READERS, BadRow, columns_of, lines_of, read_rows, read_text
from .inputs import Inputs, key_of, opened
from .records import text_of

_SHIPPED = Path(__file__).parent / "prompts"
SUFFIXES = (".txt", *READERS)
# Every reward has arguments of these names: a column of one of them cannot reach it.
RESERVED = ("images", "prompts", "self")
LONG = 5000  # characters; text encoders read some hundred words


@dataclass(frozen=True)
class Prompt:
    """A prompt and the data set's other fields, which rewards get as keyword arguments.

    Attributes:
        inputs: those of the fields that are arguments of the pipeline's call, by the argument's name; pictures as `LazyImage`.
    """

    text: str
    columns: dict = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What tells the task from another: the text alone, or with what else the pipeline gets."""
        return self.text + key_of(self.inputs)


def shipped_sets() -> list[str]:
    """Names of the sets that `load_prompts` knows."""
    return sorted(path.stem for path in _SHIPPED.iterdir() if path.suffix in SUFFIXES)


def load_prompts(source: str, column: str = "prompt", inputs: Inputs | None = None, say: Callable[[str], Any] | None = None) -> list[Prompt]:
    """Read prompts from a `.txt` file (one per line), a `.jsonl`, `.json`, `.csv` or `.tsv` file (field `column`), or a set of the package.

    Args:
        inputs: which fields are arguments of the pipeline's call, and which hold pictures for rewards. Pictures are files, relative to the prompt
            file; each is decoded once.
        say: is told what is worth knowing about the file: repeated prompts, columns that rewards do not get, pictures that are converted. A
            warning if absent.

    Raises:
        ValueError: no such file or set, no prompts in it, or a broken row (the message names row and line).
    """
    path, changes = _file_of(source), Counter()
    if path.suffix.lower() == ".txt":
        if inputs:
            flag = "--input_columns" if inputs.columns else "--picture_columns"
            raise ValueError(f"{path} has no columns, so none for {flag}: write the prompts as .jsonl or .csv, with {inputs} beside them.")
        found = list(lines_of(read_text(path)))
        rows, lines = [{column: line} for _, line in found], [number for number, _ in found]
        blank = len(found) and lines[-1] - len(found)
    else:
        (rows, lines), blank = read_rows(path), 0
    if inputs and rows:
        inputs.check_columns(columns_of(rows), path)
    prompts = []
    for number, (row, line) in enumerate(zip(rows, lines), 1):
        try:
            prompts.append(_prompt(row, column, inputs, path.parent, changes))
        except BadRow as error:
            raise ValueError(f"{path}, row {number}: {error}" + (f" (line {line})." if line else ".")) from error
    if not prompts:
        raise ValueError(f"{path} holds no prompts. Write one per line.")
    no_column = [f"it has no columns, so that --prompt_column {column} has no effect"] if path.suffix.lower() == ".txt" and column != "prompt" else []
    for note in [*no_column, *_notes(prompts, [name for name in columns_of(rows) if name != column], changes, blank)]:
        (say or partial(warnings.warn, stacklevel=2))(f"{path}: {note}.")
    return prompts


def _file_of(source: str) -> Path:
    path = Path(source).expanduser()
    if not path.suffix and source in shipped_sets():
        return next(_SHIPPED.glob(f"{source}.*"))
    kinds = "a .txt, .jsonl or .csv file (.json and .tsv are read as well)"
    if "://" in source:
        raise ValueError(f"The prompts {source!r} are a URL: download them and name {kinds}.")
    if path.is_dir():
        there = ", ".join(sorted(file.name for file in path.iterdir() if file.suffix.lower() in SUFFIXES)[:5])
        raise ValueError(f"The prompts {source!r} are a folder: name {kinds} in it" + (f", such as {there}." if there else "."))
    if not path.is_file():
        near = difflib.get_close_matches(source, shipped_sets(), 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"No prompt file {source!r}, and no shipped set of that name: there are {', '.join(shipped_sets())}.{hint}")
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path} is not {kinds}.")
    return path


def _prompt(row: Any, column: str, inputs: Inputs | None, root: Path, changes: Counter) -> Prompt:
    if isinstance(row, BadRow):
        is_value = str(row).startswith(NO_FIELDS) and not str(row).endswith(")")  # JSON, and no object
        raise BadRow(f"{row}. A row is an object with a field {column!r}; texts alone go into a .txt file, one per line") if is_value else row
    text = row.get(column)
    if column not in row:
        raise BadRow(f"no {column!r} among its fields {sorted(row)}. Name the right one with --prompt_column")
    if text is None or isinstance(text, str) and not text.strip():
        raise BadRow(f"no {column!r}, the field is empty. Fill it in or leave the row out, or name another with --prompt_column")
    given = inputs.of_row(row, root, changes) if inputs else {}
    if inputs:
        row = row | {inputs.columns[argument]: value for argument, value in given.items()} | inputs.pictures_of_row(row, root, changes)
    return Prompt(text_of(text), {name: value for name, value in row.items() if name != column and name not in RESERVED}, given)


def _notes(prompts: list[Prompt], columns: list[str], changes: Counter, blank: int) -> Iterator[str]:
    """What is worth knowing about a prompt file, in words."""
    for name in RESERVED:
        if name in columns:
            yield f"the column {name!r} is not handed to rewards, which have an argument of that name. Rename it if a reward needs it"
    if blank:
        yield f"{blank} blank lines between the prompts are left out"
    keys = Counter((p.text, key_of(p.columns)) for p in prompts)
    if repeated := [key[0] for key, number in keys.items() if number > 1]:
        yield f"{len(repeated)} prompts stand there more than once, the first is {repeated[0]!r:.60}. Each is sampled as often as it stands there"
    if marked := [p.text for p in prompts if p.text.startswith(("# ", "//"))]:
        yield f"{len(marked)} prompts begin as comments do, and are prompts like all others: {marked[0]!r:.60}"
    if long := [p.text for p in prompts if len(p.text) > LONG]:
        yield f"{len(long)} prompts have more than {LONG} characters, of which text encoders read the first few hundred words: {long[0][:40]!r}..."
    for change, number in sorted(changes.items()):
        yield f"{number} pictures {change}"


def fields_of(prompts: Sequence[Prompt]) -> dict[str, list]:
    """The data set's fields of these prompts as rewards get them, one value per prompt (None where one lacks the field), pictures read."""
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    return {name: [opened(prompt.columns.get(name)) for prompt in prompts] for name in names}


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
