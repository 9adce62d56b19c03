"""Where rows come from: files, folders, and sets of the `datasets` library, each as a table."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.json", "metadata.parquet")
FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


@dataclass(frozen=True, eq=False)
class Table:
    """Rows by number, their columns, and the folder that relative paths start from. A row that is no dict is broken."""

    rows: Sequence[Any]
    columns: list[str]
    root: Path


def open_table(source: str, split: str) -> Table:
    """The table behind a path or a Hub name.

    Raises:
        ValueError: a path without anything that can be read, or no such split.
    """
    path = Path(source)
    if path.is_file():
        return _open_file(path, split)
    if path.is_dir():
        return _open_folder(path, split)
    if path.suffix in FILE_SUFFIXES or path.is_absolute() or source.startswith("."):
        raise ValueError(f"No file or folder {source!r}.")
    try:
        dataset = _datasets().load_dataset(source, split=split)
    except Exception as error:  # the library raises many kinds, for a missing set, split, network or right
        raise ValueError(f"{source!r} is no file or folder here, and `datasets` cannot load its split {split!r} either: {error}") from error
    return _from_datasets(dataset, Path("."))


def _open_file(path: Path, split: str) -> Table:
    if path.suffix == ".parquet":
        return _open_parquet([path], path.parent)
    if path.suffix not in FILE_SUFFIXES:
        raise ValueError(f"{path} is no {', '.join(FILE_SUFFIXES)} file.")
    # utf-8-sig: spreadsheet programs put a byte order mark before the first column's name
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":
            rows = [row if None not in row else "more fields than columns" for row in csv.DictReader(file)]
        elif path.suffix == ".json":
            rows = json.load(file)
            rows = rows if isinstance(rows, list) else [rows]
        else:
            rows = [_json_line(line) for line in file if line.strip()]
    columns = list(dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row))
    return Table(rows, columns, path.parent)


def _json_line(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return line


def _open_folder(folder: Path, split: str) -> Table:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        saved = _datasets().load_from_disk(str(folder))
        if isinstance(saved, dict):
            if split not in saved:
                raise ValueError(f"{folder} has no split {split!r}. It has {', '.join(saved)}: choose one with --split.")
            saved = saved[split]
        return _from_datasets(saved, folder)
    for place in (folder / split, folder):
        for name in METADATA:
            if (place / name).is_file():
                return _open_file(place / name, split)
        if (place / "w").is_dir() and (place / "l").is_dir():
            return _open_winners_and_losers(place)
    if files := sorted(folder.rglob(f"{split}*.parquet")) or sorted(folder.rglob("*.parquet")):
        return _open_parquet(files, folder)
    raise ValueError(
        f"{folder} holds no preference data that is known. Put one of {', '.join(METADATA)} beside the images, or the images into "
        f"'w' and 'l' with a .txt of the same name for each caption, or point to a file or a folder of `save_to_disk`."
    )


def _open_winners_and_losers(folder: Path) -> Table:
    """Images of equal names in `w` and `l`; the caption in a .txt of that name beside either, or above both."""
    found = {side: {path.stem: path for path in sorted((folder / side).iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES} for side in "wl"}
    rows = []
    for stem in sorted(found["w"] | found["l"]):
        texts = [place / f"{stem}.txt" for place in (folder / "w", folder / "l", folder)]
        prompt = next((path.read_text(encoding="utf-8-sig").strip() for path in texts if path.is_file()), None)
        images = {name: found[side].get(stem) for side, name in (("w", "chosen"), ("l", "rejected"))}
        rows.append({"prompt": prompt} | {name: str(path.relative_to(folder)) if path else None for name, path in images.items()})
    return Table(rows, ["prompt", "chosen", "rejected"], folder)


def _datasets():
    try:
        import datasets
    except ImportError as error:
        raise ValueError("Sets of the Hub, of `save_to_disk` and .parquet files need the datasets library: pip install datasets.") from error
    return datasets


def _open_parquet(files: list[Path], root: Path) -> Table:
    return _from_datasets(_datasets().load_dataset("parquet", data_files=[str(file) for file in files], split="train"), root)


def _from_datasets(dataset, root: Path) -> Table:
    """Image columns stay encoded: their bytes are read one row at a time, when an image is opened."""
    datasets = _datasets()

    def encoded(feature):
        if isinstance(feature, datasets.Image):
            return datasets.Image(decode=False)
        if isinstance(feature, dict):
            return {name: encoded(part) for name, part in feature.items()}
        if isinstance(feature, list):
            return [encoded(part) for part in feature]
        if hasattr(feature, "feature"):  # the library's lists
            return dataclasses.replace(feature, feature=encoded(feature.feature))
        return feature

    features = datasets.Features({name: encoded(feature) for name, feature in dataset.features.items()})
    return Table(dataset if features == dataset.features else dataset.cast(features), list(features), root)
