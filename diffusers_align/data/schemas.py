"""Public preference sets, recognised by their columns and mapped to the canonical kinds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from .advice import WORDS, column_map_for
from .conversions import CONVERSIONS
from .files import BadRow
from .records import FALSE, KINDS, LeftOut, boolean, parsed

PROMPT_COLUMNS = ("prompt", "caption", "text")
# Diffusion-KTO's annotation of Pick-a-Pic; its default policy `wi_l` calls an image desirable that won at least once.
KTO_SPLITS = {"exclusive_win": True, "intersections": True, "exclusive_lose": False}
ARGILLA_VOTES = {"image_1": 1.0, "image_2": 0.0, "both_good": 0.5, "both_bad": 0.5, "tie": 0.5}


@dataclass(frozen=True)
class Schema:
    """How a public set writes its rows: the columns that give it away, and a function from such a row to canonical fields."""

    name: str
    kind: str
    needs: tuple[str, ...]
    read: Callable[[dict], dict]
    fits: Callable[[dict], bool] = lambda row: True


def _same(row: dict) -> dict:
    return row


def _preferred(winner: str, loser: str, row: dict) -> dict:
    return {"prompt": row["prompt"], "image_0": row[winner], "image_1": row[loser], "label_0": 1.0}


def _ranked(images: str, ranks: str, row: dict) -> dict:
    return {"prompt": row["prompt"], "images": row[images], "ranks": row[ranks]}


def _ranked_alone(image: str, row: dict) -> dict:
    group = None if row["prompt_id"] in (None, "") else (row["prompt_id"], row["prompt"])  # numbers of two sets that were put together may be equal
    return {"prompt": row["prompt"], "images": [row[image]], "ranks": [row["rank"]], "group": group}


def _is_false(value: object) -> bool:
    return str(value).lower() in FALSE


def _pick_a_pic(row: dict) -> dict:
    if _is_false(row.get("has_label")):
        raise LeftOut("without a label")
    if _is_false(row.get("are_different")):
        raise LeftOut("of twice the same image")
    fields = {"prompt": row["prompt"], "image_0": row["jpg_0"], "image_1": row["jpg_1"], "label_0": row["label_0"]}
    return fields | {name: row[name] for name in ("image_0_uid", "image_1_uid") if name in row}


def _votes_of_two(row: dict) -> dict:
    first, second = (boolean(row[name], name) for name in ("prefer_0", "prefer_1"))
    return {**row, "label_0": 0.5 if first == second else float(first)}


def _human_preference_dataset(row: dict) -> dict:
    """HPDv1 gives the index of the preferred image, HPDv2 a 1 for it and 0 for the others."""
    preference, images = parsed(row["human_preference"]), parsed(row["file_path"])
    if isinstance(preference, list):
        return {"prompt": row["prompt"], "images": images, "ranks": [1 if boolean(one, "human_preference") else 2 for one in preference]}
    number = len(images) if isinstance(images, list) else 0
    if isinstance(preference, bool) or preference not in range(number):
        raise BadRow(f"human_preference is {preference!r:.60}, neither the number of one of {number} images nor a list of 1 and 0")
    return {"prompt": row["prompt"], "images": images, "ranks": [1 if i == preference else 2 for i in range(number)]}


def _argilla(row: dict) -> dict:
    votes = parsed(row["preference.responses"])
    if not votes:
        raise LeftOut("without a label")
    if not isinstance(votes, list):
        raise BadRow(f"preference.responses is not a list: {votes!r:.60}")
    if unknown := [vote for vote in votes if vote not in ARGILLA_VOTES]:
        raise BadRow(f"unknown response {unknown[0]!r}; known are {', '.join(ARGILLA_VOTES)}")
    label, images = sum(ARGILLA_VOTES[vote] for vote in votes) / len(votes), parsed(row["images"])
    if not isinstance(images, dict):
        raise BadRow(f"images is no object with image_1, image_2 and prompt: {images!r:.60}")
    return {"prompt": images.get("prompt"), "image_0": images.get("image_1"), "image_1": images.get("image_2"), "label_0": label}


def _diffusion_kto(row: dict) -> dict:
    if row["split"] not in KTO_SPLITS:
        raise BadRow(f"split is {row['split']!r}, which is none of {', '.join(KTO_SPLITS)}")
    return {"prompt": row["prompt"], "image": row["image"], "label": KTO_SPLITS[row["split"]]}


def _trl_unpaired(row: dict) -> dict:
    return {"prompt": row["prompt"], "image": row["completion"], "label": row["label"]}


SCHEMAS = (
    *(Schema(f"{kind} rows", kind, columns, _same) for kind, columns in KINDS.items()),
    Schema("Pick-a-Pic", "pair", ("prompt", "jpg_0", "jpg_1", "label_0"), _pick_a_pic),
    Schema("invoke-training", "pair", ("prompt", "image_0", "image_1", "prefer_0", "prefer_1"), _votes_of_two),
    Schema("HPDv3", "pair", ("prompt", "path1", "path2"), partial(_preferred, "path1", "path2")),
    Schema("ImageRewardDB pairs", "pair", ("prompt", "img_better", "img_worse"), partial(_preferred, "img_better", "img_worse")),
    Schema("chosen/rejected", "pair", ("prompt", "chosen", "rejected"), partial(_preferred, "chosen", "rejected")),
    Schema("open-image-preferences (Argilla)", "pair", ("images", "preference.responses"), _argilla),
    Schema("HPDv1/HPDv2 train", "ranked", ("prompt", "file_path", "human_preference"), _human_preference_dataset),
    Schema(
        "HPDv2 test", "ranked", ("prompt", "image_path", "rank"), partial(_ranked, "image_path", "rank"), lambda row: isinstance(parsed(row.get("rank")), list)
    ),
    Schema("ImageRewardDB", "ranked", ("prompt_id", "prompt", "image_path", "rank"), partial(_ranked_alone, "image_path")),
    Schema("ImageRewardDB", "ranked", ("prompt_id", "prompt", "image", "rank"), partial(_ranked_alone, "image")),
    Schema("ImageReward groups", "ranked", ("prompt", "generations", "ranking"), partial(_ranked, "generations", "ranking")),
    Schema("Diffusion-KTO", "binary", ("prompt", "image", "split"), _diffusion_kto, lambda row: row.get("split") in KTO_SPLITS),
    Schema("prompt/completion/label", "binary", ("prompt", "completion", "label"), _trl_unpaired),
)


def parse_column_map(text: str) -> dict[str, str]:
    """`"prompt=caption,image_0=left"` as {canonical column: column of the data set}.

    Raises:
        ValueError: a part without `=`, or a canonical column named twice.
    """
    mapping: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, column = (word.strip() for word in part.partition("="))
        if not (name and equals and column):
            raise ValueError(f"--column_map: {part!r} is not NAME=COLUMN. Example: --column_map 'prompt=caption,image_0=left'.")
        if name in mapping:
            raise ValueError(f"--column_map names {name!r} twice.")
        mapping[name] = column
    return mapping


def names_of(columns: Iterable[str], column_map: dict[str, str] | None) -> dict[str, str]:
    """{name to read by: column}: each column, `X_file_name` as X as in `imagefolder` sets, the prompt, and what `column_map` says.

    Raises:
        ValueError: `column_map` names a column that the data set lacks.
    """
    columns = list(columns)
    names = {column: column for column in columns}
    for column in columns:
        for suffix, whole in (("file_name", "image"), ("file_names", "images")):
            if column == suffix or column.endswith(f"_{suffix}"):
                names.setdefault(column.removesuffix(suffix).rstrip("_") or whole, column)
    for name, column in (column_map or {}).items():
        if column not in columns:
            raise ValueError(f"--column_map: the data set has no column {column!r}. It has {', '.join(columns)}.")
        names[name] = column
    if prompt := next((name for name in PROMPT_COLUMNS if name in names), None):
        names["prompt"] = names[prompt]
    return names


def recognise(names: dict[str, str], kind: str, first_rows: Sequence[dict], source: str, mappable: bool = True) -> Schema:
    """The schema to read a set of these columns by, for rows of `kind` or of a kind that becomes it.

    One of the kind itself comes first, and among equals the one with the most columns; plain captions come last. A schema that is told by values fits
    where it fits one of the first rows: the others may be broken. `mappable`: whether errors may advise `--column_map`.

    Raises:
        ValueError: no schema fits.
    """
    fitting = [s for s in SCHEMAS if set(s.needs) <= set(names) and any(map(s.fits, first_rows)) and (s.kind == kind or (s.kind, kind) in CONVERSIONS)]
    if not fitting:
        known = [s for s in SCHEMAS if s.kind == kind and s.read is not _same]
        there = list(dict.fromkeys(names.values()))
        raise ValueError(
            f"{source} is no data of kind {kind!r} that is known. Its columns: {', '.join(there)}. Needed: {', '.join(KINDS[kind])}"
            + (f"; or one of the public layouts: {'; '.join(', '.join(s.needs) for s in known)}" if known else "")
            + _advice(names, there, kind, [s.needs for s in known], mappable)
        )
    return max(fitting, key=lambda s: (s.kind == kind != "captioned", len(s.needs)))


def _advice(names: dict[str, str], there: list[str], kind: str, layouts: list[tuple[str, ...]], mappable: bool) -> str:
    """The end of the sentence: the `--column_map` that reads the columns, as far as their names tell; or, where there is none for them, their new names."""
    # layouts of plain words come before those that need a set's own columns
    plain = [needs for needs in layouts if set(needs) <= set(WORDS)]
    if found := column_map_for(there, [KINDS[kind], *plain]):
        changed = {column: name for name, column in found.items() if name != column}
        if not mappable:
            return f". Perhaps these columns are meant: rename {', '.join(f'{column} to {name}' for column, name in changed.items())}." if changed else "."
        example = ",".join(f"{name}={column}" for column, name in changed.items())
        return f". Perhaps these columns are meant: --column_map '{example}'." if example else "."
    missing = [name for name in KINDS[kind] if name not in names]
    if not missing:
        return "."
    if not mappable:
        return f". Rename the columns that hold what is missing: {', '.join(missing)}."
    example = ",".join(f"{name}=YOUR_COLUMN" for name in missing)
    others = "".join(f", or '{','.join(f'{name}=YOUR_COLUMN' for name in needs if name not in names)}'" for needs in plain)
    return f". Say which columns hold what is missing: --column_map '{example}'{others}."


def renamed(row: Any, names: dict[str, str]) -> dict:
    """The row under the names of `names_of`. Columns that the row lacks come as None."""
    return {name: row.get(column) for name, column in names.items()}
