"""Text files as people have them: their encoding, their lines, and rows of named fields, or a sentence that says where one is broken."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

# Marks at a file's start that say its encoding; those of 32 bits begin as those of 16 do.
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
NO_FIELDS = "not a row of named fields: "


class BadRow(ValueError):
    """A row that is broken; the message says how."""


def read_text(path: Path) -> str:
    """A file in UTF-8, or in the encoding that its byte order mark names. No other is guessed: a wrong guess would train on other words.

    Raises:
        ValueError: it is in none of them, or no text; the message names the line and what to do.
    """
    data = path.read_bytes()
    encoding = next((name for mark, name in MARKS.items() if data.startswith(mark)), "utf-8")
    if encoding.startswith("utf-8") and b"\0" in data:
        raise ValueError(f"{path} is no text: byte {data.index(0) + 1} is zero, as in binary files and in UTF-16 without a mark. Save it as text in UTF-8.")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        remedy = f"If it is in Latin-1: iconv -f latin1 -t utf-8 {path.name} > utf8_{path.name}" if encoding == "utf-8" else "It may have been cut off."
        raise ValueError(
            f"{path} is not in {encoding.removesuffix('-sig').upper()} (line {line}: byte {error.start + 1}, 0x{data[error.start]:02x}, {error.reason}). "
            f"Save it in UTF-8. {remedy}"
        ) from error


def lines_of(text: str) -> Iterator[tuple[int, str]]:
    r"""(number from 1, line) of every line that is not blank. Lines end with \n or \r\n alone: other separators occur inside prompts."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.removesuffix("\r")


def read_rows(path: Path) -> tuple[list[Any], list[int]]:
    """Rows of named fields and the lines where they begin, from 1 (0 where a .json file does not tell). Of a broken row there is a
    `BadRow`, which says how.

    Raises:
        ValueError: the file cannot be read as what its suffix says.
    """
    found = list(READERS[path.suffix.lower()](path, read_text(path)))
    return [row for _, row in found], [line for line, _ in found]


def columns_of(rows: list[Any]) -> list[str]:
    """The names of the rows' fields, in order of appearance."""
    return list(dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict; a name that stands twice is an error rather than its last value."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise BadRow(f"the field {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return found


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    for number, line in lines_of(text):
        try:
            yield number, _fields(json.loads(line, object_pairs_hook=_once))
        except json.JSONDecodeError as error:
            yield number, BadRow(f"{NO_FIELDS}{line.strip()[:80]!r} ({error.msg} at column {error.colno})")
        except RecursionError:
            yield number, BadRow(f"{NO_FIELDS}{line.strip()[:80]!r} (too deeply nested)")
        except BadRow as error:
            yield number, error


def _json(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    if not text.strip():
        return
    try:
        rows = json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): repair it, or call it .jsonl if each line is an object of its own.") from error
    except (RecursionError, BadRow) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}.") from error
    for row in rows if isinstance(rows, list) else [rows]:
        yield 0, _fields(row)


def _fields(row: Any) -> Any:
    return row if isinstance(row, dict) else BadRow(f"{NO_FIELDS}{str(row).strip()[:80]!r}")


def _separated(delimiter: str, path: Path, text: str) -> Iterator[tuple[int, Any]]:
    reader, line = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), 1
    try:
        header = next((fields for fields in reader if any(name.strip() for name in fields)), [])
        _check_header(path, header, delimiter)
        line = reader.line_num + 1
        for fields in reader:
            if fields:
                yield line, dict(zip(header, fields)) if len(fields) == len(header) else BadRow(_unequal(fields, header))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{path} cannot be read as {path.suffix[1:].upper()} ({error}, in the row that begins in line {line}): close and double its quotation marks, "
            "or save it as .jsonl."
        ) from error


def _check_header(path: Path, header: list[str], delimiter: str) -> None:
    if twice := [name for name in header if header.count(name) > 1]:
        raise ValueError(f"{path}: its first line, the header, names the column {twice[0]!r} twice. Give each a name of its own.")
    if len(header) == 1 and (other := [mark for mark in ";\t|," if mark in header[0]]):
        kind = "commas" if delimiter == "," else "tabs"
        raise ValueError(f"{path} has one column, {header[0]!r}: its fields are to be separated by {kind}, not by {other[0]!r}. Save it so, or as .jsonl.")


def _unequal(fields: list[str], header: list[str]) -> str:
    if len(fields) > len(header):
        return f"more fields than columns: {fields[len(header) :]}. Quote texts that hold the separator"
    return f"fewer fields than columns: no {', '.join(map(repr, header[len(fields) :]))}. Write a separator for each, also before what is empty"


READERS: dict[str, Callable[[Path, str], Iterator[tuple[int, Any]]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": partial(_separated, ","),
    ".tsv": partial(_separated, "\t"),
}
