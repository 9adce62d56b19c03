"""What the files hold that a flag names, as a hash: an edited file is a change, a moved one is none."""

from __future__ import annotations

import hashlib
import itertools
import os
from pathlib import Path

from ...rewards.registry import parse_terms

# A file up to this size counts by its content, a larger one by its size.
READ_BYTES, MAX_FILES, LISTS = 1 << 26, 10_000, (".jsonl", ".csv", ".json", ".txt")


def content(value: str) -> str | None:
    """A hash of what the files hold that a flag's value names: itself a path, or the sum of a reward's terms. None if it names no file.

    Of folders the names and sizes count, and the content of the lists in them (.jsonl, .csv, .json, .txt); of those with very many files the
    lists alone.
    """
    if os.path.exists(value):  # not Path.exists, which raises for what is too long to be a name
        return _hash(Path(value))
    parts = []
    for name, weight in _terms(value):
        path, _, attribute = name.rpartition(":")
        if os.path.exists(path or name):
            parts.append((_hash(Path(path or name)), attribute if path else "", weight))
        else:
            parts.append((name, weight))
    return hashlib.sha256(repr(parts).encode()).hexdigest() if any(len(part) == 3 for part in parts) else None


def _terms(value: str) -> list[tuple[str, float | None]]:
    try:
        return parse_terms(value)
    except ValueError:
        return []


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    if path.is_file():
        _take_in(digest, path)
        return digest.hexdigest()
    files = list(itertools.islice((file for file in path.rglob("*") if file.is_file()), MAX_FILES + 1))
    if len(files) > MAX_FILES:
        files = [file for file in path.iterdir() if file.suffix in LISTS and file.is_file()]
    for file in sorted(files):
        digest.update(f"{file.relative_to(path).as_posix()} {file.stat().st_size}\n".encode())
        if file.suffix in LISTS:
            _take_in(digest, file)
    return digest.hexdigest()


def _take_in(digest, file: Path) -> None:
    size = file.stat().st_size
    digest.update(file.read_bytes() if size <= READ_BYTES else str(size).encode())
