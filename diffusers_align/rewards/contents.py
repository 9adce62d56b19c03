"""What stands behind the value of a flag, as a hash: the files that it names, the module of a reward, the reward of a server. An edit is a change, a moved file
is none."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import os
from pathlib import Path

from ..files import weight_files
from . import remote
from .registry import BUILT_INS, importable, is_url, parse_terms

# A file up to this size counts by its content, a larger one by its size and pieces of it.
READ_BYTES, MAX_FILES, LISTS = 1 << 26, 10_000, (".jsonl", ".csv", ".json", ".txt")


def content(value: str) -> str | None:
    """A hash of what the files hold that a flag's value names: itself a path, or the sum of a reward's terms. None if it names no file, no module, and no
    server that was asked.

    Of folders the names and sizes count, the content of the lists in them (.jsonl, .csv, .json, .txt) and pieces of their weights; of those with very many
    files the lists alone.
    """
    if os.path.exists(value):  # not Path.exists, which raises for what is too long to be a name
        return _hash(Path(value))
    parts = []
    for name, weight in _terms(value):
        path, _, attribute = name.rpartition(":")
        place = os.path.expanduser(path or name)
        if is_url(name):
            parts.append((name, weight) if name not in remote.SERVED else (remote.SERVED[name], "", weight))
        elif file := _file_of_module(path):  # before folders of that name, of which the package may be one
            parts.append((_hash(file), attribute, weight))
        elif os.path.exists(place):
            parts.append((_hash(Path(place)), attribute if path else "", weight))
        else:
            parts.append((name, weight))
    return hashlib.sha256(repr(parts).encode()).hexdigest() if any(len(part) == 3 for part in parts) else None


def _file_of_module(name: str) -> Path | None:
    """The file of a module that is named in a reward `module:function`."""
    if not name or name in BUILT_INS or not all(part.isidentifier() for part in name.split(".")):
        return None
    importable(os.getcwd())
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec is not None and spec.origin and os.path.isfile(spec.origin) else None


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
        elif file.suffix in weight_files.SUFFIXES:
            weight_files.take_pieces(digest, file)
    return digest.hexdigest()


def _take_in(digest, file: Path) -> None:
    size = file.stat().st_size
    digest.update(file.read_bytes() if size <= READ_BYTES else str(size).encode())
    if size > READ_BYTES:
        weight_files.take_pieces(digest, file)
