"""Where rows come from: files, folders, and sets of the `datasets` library, each as a table."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import NO_FIELDS, READERS, BadRow, columns_of, read_rows

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
METADATA = tuple(f"metadata{suffix}" for suffix in (".jsonl", ".csv", ".json", ".parquet", ".tsv"))
FILE_SUFFIXES = (*READERS, ".parquet")
WHOLE = "train"  # the split that data without splits goes by, as in `datasets`
SPLITS = (WHOLE, "validation", "valid", "val", "dev", "test", "eval")
SHARD = re.compile(r"-\d+-of-\d+$")


@dataclass(frozen=True, eq=False)
class Table:
    """Rows by number, their columns, the folder that relative paths start from, and in text files the rows' lines (0: unknown). Of a
    broken row there is a `BadRow`, which says how."""

    rows: Sequence[Any]
    columns: list[str]
    root: Path
    lines: Sequence[int] = ()

    def place(self, number: int) -> str:
        """Where the row stands in its file, where that is not what its number says already."""
        line = self.lines[number] if self.lines else 0
        return f" (line {line})" if line not in (0, number + 1) else ""


def open_table(source: str, split: str) -> Table:
    """The table behind a path or a Hub name.

    Raises:
        ValueError: a path without anything that can be read, or no such split.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if split not in (WHOLE, path.stem):
            raise _no_split(path, split, [WHOLE])
        return _open_file(path)
    if path.is_dir():
        return _open_folder(path, split)
    if path.suffix.lower() in FILE_SUFFIXES or path.is_absolute() or source.startswith("."):
        raise ValueError(f"No file or folder {source!r}.")
    try:
        dataset = _datasets().load_dataset(source, split=split)
    except Exception as error:  # the library raises many kinds, for a missing set, split, network or right
        raise ValueError(f"{source!r} is no file or folder here, and `datasets` cannot load its split {split!r} either: {error}") from error
    return _from_datasets(dataset, Path("."))


def _no_split(source: Path, split: str, there: Sequence[str]) -> ValueError:
    return ValueError(f"{source} has no split {split!r}, only {', '.join(there)}: choose one of these.")


def _open_file(path: Path) -> Table:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _open_parquet([path], path.parent)
    if suffix not in FILE_SUFFIXES:
        raise ValueError(f"{path} is no {', '.join(FILE_SUFFIXES)} file.")
    rows, lines = read_rows(path)
    columns = columns_of(rows)
    if rows and not columns:
        first = str(rows[0]).removeprefix(NO_FIELDS)
        raise ValueError(f"{path} has no row of named fields; the first is {first}. Rows are JSON objects, or lines under a header.")
    return Table(rows, columns, path.parent, lines)


def _open_folder(folder: Path, split: str) -> Table:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        saved = _datasets().load_from_disk(str(folder))
        saved = saved if isinstance(saved, dict) else {WHOLE: saved, str(saved.split or WHOLE): saved}
        if split not in saved:
            raise _no_split(folder, split, list(saved))
        return _from_datasets(saved[split], folder)
    found = {place.name: data for place in sorted(folder.iterdir()) if place.is_dir() and (data := _data_in(place))}
    if data := _data_in(folder):
        found[WHOLE] = _the_only([data, found[WHOLE]], folder) if WHOLE in found else data
    if split in found:
        return _open_winners_and_losers(found[split]) if found[split].is_dir() else _open_file(found[split])
    if files := _parquet_files(folder, split):
        return _open_parquet(files, folder)
    if found:
        raise _no_split(folder, split, list(found))
    raise ValueError(
        f"{folder} holds no preference data that is known. Put one of {', '.join(METADATA)} beside the images, or the images into "
        f"'w' and 'l' with a .txt of the same name for each caption, or point to a file or a folder of `save_to_disk`."
    )


def _data_in(place: Path) -> Path | None:
    """The metadata file in a folder, or the folder itself where it holds winners and losers.

    Raises:
        ValueError: it holds several of them.
    """
    found = [place / name for name in METADATA if (place / name).is_file()]
    found += [place] if (place / "w").is_dir() and (place / "l").is_dir() else []
    return _the_only(found, place)


def _the_only(found: list[Path], place: Path) -> Path | None:
    if len(found) > 1:
        names = ", ".join("the folders w and l" if path.is_dir() else str(path.relative_to(place)) for path in found)
        raise ValueError(f"{place} describes its data more than once: {names}. Name the one to read, as a file, or move the others away.")
    return found[0] if found else None


def _parquet_files(folder: Path, split: str) -> list[Path]:
    """Those whose own name, or that of a folder above them, is the split, or else begins with it; all for `WHOLE` where none names a split.

    Raises:
        ValueError: there are some, of other splits.
    """
    files = sorted(folder.rglob("*.parquet"))
    names = {file: [SHARD.sub("", part) for part in (*file.relative_to(folder).parent.parts, file.stem)] for file in files}

    def begins(file: Path, word: str) -> bool:
        return any(re.match(rf"{re.escape(word)}(?![^\W_])", name) for name in names[file])

    if found := [file for file in files if split in names[file]] or [file for file in files if begins(file, split)]:
        return found
    there = [known for known in SPLITS if any(begins(file, known) for file in files)]
    if files and (there or split != WHOLE):
        raise _no_split(folder, split, there or [WHOLE])
    return files


def _open_winners_and_losers(folder: Path) -> Table:
    """Images of equal names in `w` and `l`; the caption in a .txt of that name beside either, or above both."""
    found: dict[str, dict[str, list[Path]]] = {"w": {}, "l": {}}
    strange: list[Any] = []
    for side, images in found.items():
        for path in sorted((folder / side).iterdir()):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                images.setdefault(path.stem, []).append(path)
            elif path.suffix != ".txt" and not path.name.startswith("."):
                strange.append(BadRow(f"{side}/{path.name} is neither an image ({', '.join(IMAGE_SUFFIXES)}) nor a caption (.txt)"))
    rows = [_winner_and_loser(folder, stem, *(images.get(stem, []) for images in found.values())) for stem in sorted(found["w"] | found["l"])]
    return Table(rows + strange, ["prompt", "chosen", "rejected"], folder)


def _winner_and_loser(folder: Path, stem: str, winners: list[Path], losers: list[Path]) -> dict | BadRow:
    for images in (winners, losers):
        if len(images) > 1:
            return BadRow(f"{images[0].parent.name} holds several images of one name: {', '.join(path.name for path in images)}")
    texts = [path for place in (folder / "w", folder / "l", folder) if (path := place / f"{stem}.txt").is_file()]
    try:
        captions = {path.read_text(encoding="utf-8-sig").strip() for path in texts}
    except UnicodeDecodeError as error:
        return BadRow(f"a caption {stem}.txt is not in UTF-8 ({error})")
    if len(captions) > 1:
        return BadRow(f"different captions: {', '.join(str(path.relative_to(folder)) for path in texts)}")
    images = {"chosen": winners, "rejected": losers}
    return {"prompt": next(iter(captions), None)} | {name: str(paths[0].relative_to(folder)) if paths else None for name, paths in images.items()}


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
    rows = dataset if features == dataset.features else dataset.cast(features)
    return Table(_Named(rows) if any(map(_has_classes, features.values())) else rows, list(features), root)


def _has_classes(feature: Any) -> bool:
    if isinstance(feature, dict):
        return any(map(_has_classes, feature.values()))
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    return isinstance(feature, _datasets().ClassLabel) or inner is not None and _has_classes(inner)


class _Named(Sequence):
    """Rows whose `ClassLabel`s are names: their numbers follow the alphabet, where "desirable" is 0 and "undesirable" 1."""

    def __init__(self, rows):
        self._rows, self._label = rows, _datasets().ClassLabel

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> dict:
        return {name: self._of(value, self._rows.features[name]) for name, value in self._rows[number].items()}

    def _of(self, value: Any, feature: Any) -> Any:
        if value is None:
            return None
        if isinstance(feature, self._label):
            return feature.int2str(int(value)) if int(value) >= 0 else None  # -1: without a label
        if isinstance(feature, dict):
            return {name: self._of(part, feature[name]) for name, part in value.items()}
        inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        if inner is None:
            return value
        if isinstance(value, dict):  # older datasets have a list of objects as an object of lists
            return {name: [self._of(part, inner[name]) for part in parts] for name, parts in value.items()}
        return [self._of(part, inner) for part in value]
