"""One call from any source of preferences to checked rows of one kind, and a report of what was left out and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from .conversions import CONVERSIONS, apply_ties, weight_by_prompt
from .files import BadRow
from .images import LazyImage
from .inputs import Inputs
from .records import KINDS, LeftOut, canonical
from .schemas import Schema, names_of, recognise, renamed
from .sources import Table, open_table

SHOWN_BAD_ROWS = 10
PROGRESS_FROM = 1000
LOOKED_AT = 20  # rows that tell how a set writes its rows


@dataclass
class Report:
    """What `load_preferences` did. `print` it: a data set that shrank in silence is a bug in waiting.

    Attributes:
        rows: rows of the source that were read.
        kept: rows handed over (of the kind asked for, so after any conversion).
        left_out: sound rows without a preference, by reason.
        ties: pairs without a winner; `ties_policy` says what became of them.
        images: images that are not read as they are, by what is done about them.
        bad: number and reason of every broken row; rows count from 1.
    """

    source: str
    kind: str
    schema: str
    ties_policy: str
    converted: str = ""
    prompt_column: str = "prompt"
    rows: int = 0
    kept: int = 0
    ties: int = 0
    left_out: Counter = field(default_factory=Counter)
    images: Counter = field(default_factory=Counter)
    bad: list[tuple[int, str]] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.rows} rows read as {self.schema}, {self.kept} rows of kind {self.kind!r} kept."]
        if self.prompt_column != "prompt":
            lines.append(f"Prompts come from column {self.prompt_column!r}.")
        if self.converted:
            lines.append(f"Converted: {self.converted}.")
        if self.ties:
            fate = {"drop": "dropped", "soft": "kept with label 0.5", "keep": "kept in both directions at half the weight"}[self.ties_policy]
            lines.append(f"{self.ties} ties {fate}.")
        lines += [f"{number} rows {reason} left out." for reason, number in sorted(self.left_out.items())]
        lines += [f"{number} images {change}." for change, number in sorted(self.images.items())]
        if self.bad:
            lines.append(f"{len(self.bad)} bad rows skipped:")
            lines += [f"  row {number}: {reason}" for number, reason in self.bad[:SHOWN_BAD_ROWS]]
            lines += [f"  and {len(self.bad) - SHOWN_BAD_ROWS} more"] if len(self.bad) > SHOWN_BAD_ROWS else []
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class _Cell:
    """An image inside a table's row, read again at each call: sets of hundreds of gigabytes stay on disk."""

    table: Table
    names: dict[str, str]
    read: Callable[[dict], dict]
    number: int
    field: str
    position: int | None

    def __call__(self) -> Any:
        value = self.read(renamed(self.table.rows[self.number], self.names))[self.field]
        return value if self.position is None else value[self.position]


@dataclass
class _Scan:
    """The pass over a table: rows of the schema's kind, and the images that were found sound."""

    table: Table
    names: dict[str, str]
    schema: Schema
    root: Path
    verify: str
    changes: Counter
    inputs: Inputs | None = None
    verified: set[Path] = field(default_factory=set)

    def row(self, number: int) -> dict:
        raw = self.table.rows[number]
        if isinstance(raw, BadRow):
            raise raw
        own = renamed(raw, self.names)
        fields = self.schema.read(own)
        row = canonical(self.schema.kind, fields)
        for name in ("image", "image_0", "image_1"):
            if name in row:
                row[name] = self.image(row[name], name, fields.get(f"{name}_uid"), number, name, None)
        if "images" in row:
            row["images"] = [self.image(image, f"images[{i}]", None, number, "images", i) for i, image in enumerate(row["images"])]
        if self.inputs:
            row["inputs"] = self.inputs.of_row(raw, self.root, self.changes, lambda: self.table.rows[number])
        if self.schema.kind == "ranked" and fields is not own and fields.get("group") is not None:  # a column of that name is its user's own
            row["group"] = fields["group"]
        return row

    def image(self, value: Any, name: str, uid: Any, number: int, column: str, position: int | None) -> LazyImage:
        path = value.get("path") if isinstance(value, dict) and not value.get("bytes") else value
        if isinstance(path, (str, Path)):
            image = LazyImage(self.path(str(path), name), uid)
        elif isinstance(value, (dict, bytes)) or hasattr(value, "convert"):
            image = LazyImage(_Cell(self.table, self.names, self.schema.read, number, column, position), uid)
        else:
            raise BadRow(f"{name} is neither a path, bytes nor an image but a {type(value).__name__}")
        if self.verify != "none" and image.source not in self.verified:
            try:
                self.changes.update(image.check(self.verify))
            except BadRow as error:
                raise BadRow(f"{name} cannot be read: {error}") from error
            if isinstance(image.source, Path):
                self.verified.add(image.source)
        return image

    def path(self, text: str, name: str) -> Path:
        if "://" in text:
            raise BadRow(f"{name} is a URL, {text:.80}: download the images first")
        path = self.root / text
        if not path.is_file():
            raise BadRow(f"{name}: no file {path}")
        return path


def load_preferences(
    source: str,
    kind: str,
    *,
    column_map: dict[str, str] | None = None,
    ties: str = "drop",
    bad_rows: str = "skip",
    split: str = "train",
    max_rows: int | None = None,
    verify: str = "full",
    image_root: str | None = None,
    weighting: str = "row",
    inputs: Inputs | None = None,
    progress: bool = True,
    mappable: bool = True,
) -> tuple[list[dict], Report]:
    """Rows of `kind` (see `KINDS`) from a file, a folder or a Hub set, their images as `LazyImage`, and a report.

    Args:
        source: a .jsonl, .json, .csv or .parquet file; a folder with a metadata file, with `w` and `l` in it, of parquet files, or of
            `datasets`' `save_to_disk`; or a name for `datasets.load_dataset`.
        kind: captioned, pair, binary, scored or ranked. A set of another kind is converted where there is one way to do it; the report says how.
        column_map: {canonical column: the set's column}, see `parse_column_map`.
        ties: drop, soft or keep, see `conversions.apply_ties`.
        bad_rows: skip and report broken rows, or `error` at the first.
        max_rows: read only the first so many rows of the source.
        verify: decode each image now (`full`), read its header (`header`: finds missing files and no-images, not truncated ones), or `none`.
        image_root: folder of relative image paths; the one of the file if absent.
        weighting: weights of pairs as they are (`row`), or summing to 1 for each prompt (`prompt`).
        inputs: columns that are arguments of the pipeline's call: rows have them under `inputs`, by the argument's name. Rewards' own pictures
            (`Inputs.pictures`) are read from prompt files alone.
        mappable: whether errors may advise `--column_map`, which of a script's several data sets is for one.

    Raises:
        ValueError: an unknown source, split, option or layout; a bad row with `bad_rows="error"`; or no rows left.
    """
    _check_options(kind=(kind, KINDS), ties=(ties, ("drop", "soft", "keep")), bad_rows=(bad_rows, ("skip", "error")))
    _check_options(verify=(verify, ("full", "header", "none")), weighting=(weighting, ("row", "prompt")))
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, or None for all, got {max_rows}.")
    table = open_table(source, split)
    if not len(table.rows):
        raise ValueError(f"{source} has no rows.")
    names = names_of(table.columns, column_map)
    first = [renamed(row, names) for row in islice((row for row in table.rows if isinstance(row, dict)), LOOKED_AT)]
    schema = recognise(names, kind, first or [renamed({}, names)], source, mappable)
    if inputs:
        _check_inputs(inputs, table, schema, kind, source)
    report = Report(source, kind, schema.name, ties, prompt_column=names.get("prompt", "prompt"))
    scan = _Scan(table, names, schema, Path(image_root).expanduser() if image_root else table.root, verify, report.images, inputs)
    rows = _read(scan, report, max_rows, bad_rows, progress)
    if schema.kind == "ranked":
        rows = _merge_groups(rows, report)
    if schema.kind != kind:
        convert, report.converted = CONVERSIONS[schema.kind, kind]
        rows = convert(rows)
    if kind == "pair":
        if twice := sum(isinstance(row["image_0"].source, Path) and row["image_0"].source == row["image_1"].source for row in rows):
            report.images["are both sides of their own pair, which prefers nothing"] = twice
        rows, report.ties = apply_ties(rows, ties)
        rows = weight_by_prompt(rows) if weighting == "prompt" else rows
    report.kept = len(rows)
    if not rows:
        raise ValueError(f"No rows are left.\n{report}")
    return rows, report


def _check_inputs(inputs: Inputs, table: Table, schema: Schema, kind: str, source: str) -> None:
    inputs.check_columns(table.columns, source)
    if schema.kind != kind:
        raise ValueError(f"{source} holds {schema.kind!r} rows, which would mix images of different {inputs} as {kind!r}. Give rows of that kind.")


def _check_options(**options: tuple) -> None:
    for name, (value, known) in options.items():
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}.")


def _read(scan: _Scan, report: Report, max_rows: int | None, bad_rows: str, progress: bool) -> list[dict]:
    rows = []
    report.rows = min(len(scan.table.rows), max_rows or len(scan.table.rows))
    for number in tqdm(range(report.rows), desc="Checking the data", disable=not progress or report.rows < PROGRESS_FROM):
        try:
            rows.append(scan.row(number))
        except LeftOut as reason:
            report.left_out[str(reason)] += 1
        except (ValueError, TypeError) as error:
            if bad_rows == "error":
                raise ValueError(f"{report.source}, row {number + 1}: {error}{scan.table.place(number)}.") from error
            report.bad.append((number + 1, f"{error}{scan.table.place(number)}"))
    return rows


def _merge_groups(rows: list[dict], report: Report) -> list[dict]:
    """One row per prompt where the set has one per image (of an equal id and prompt); rankings of a single image say nothing."""
    merged: dict[Any, dict] = {}
    for number, row in enumerate(rows):
        key = ("group", row.pop("group")) if "group" in row else ("row", number)
        if key in merged:
            merged[key]["images"] += row["images"]
            merged[key]["ranks"] += row["ranks"]
        else:
            merged[key] = row
    ranked = [row for row in merged.values() if len(row["images"]) > 1]
    if alone := len(merged) - len(ranked):
        report.left_out["of rankings with one image"] += alone
    return ranked
