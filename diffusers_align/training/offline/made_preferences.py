"""Data sets of each kind from the rewards of a model's own images, and whether there is anything to learn from them.

The other end of what this folder reads: `make_preferences.py` alone writes, and is long enough without.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ...data.conversions import scored_to_binary, scored_to_pairs, scored_to_ranked
from ...data.images import LazyImage
from ...data.prompts import Prompt

Job = tuple[int, int]  # the prompt's number and the image's


def file_name(job: Job) -> str:
    """Of an image and what belongs to it, without suffix."""
    prompt, sample = job
    return f"{prompt:05d}_{sample:02d}"


def scored_groups(prompts: Sequence[Prompt], jobs: Sequence[Job], rewards: Sequence[float]) -> dict[int, list[dict]]:
    """The `scored` rows of each prompt, by its number: prompts of equal text are kept apart. Images without a score (NaN) are left out."""
    groups: dict[int, list[dict]] = {}
    for (number, sample), reward in zip(jobs, rewards):
        if reward == reward:
            row = {"prompt": prompts[number].text, "image": f"../images/{file_name((number, sample))}.png", "reward": reward}
            groups.setdefault(number, []).append(row)
    return groups


def data_sets(args, prompts: Sequence[Prompt], groups: dict[int, list[dict]], folder: Path) -> dict[str, list[dict]]:
    """Rows of each kind, for files in a subfolder of `folder`, with the prompts' other fields; a picture that the pipeline got goes by its file,
    and as `input_NAME` where the kind has a column of its name."""
    kept = [(number, row) for number, rows in groups.items() for row in rows]
    limit = {"quantile": args.binary_quantile} if args.binary_threshold is None else {"threshold": args.binary_threshold}
    labelled = scored_to_binary([row for _, row in kept], **limit)
    found = {
        "pairs": [(number, row) for number, rows in groups.items() for row in scored_to_pairs(rows, args.pairs, args.min_margin)],
        "binary": [(number, row) for (number, _), row in zip(kept, labelled)],
        "scored": kept,
        "ranked": [(number, row) for number, rows in groups.items() for row in scored_to_ranked(rows)],
    }
    return {name: [{**_written(prompts[number].columns, row, folder / name), **row} for number, row in rows] for name, rows in found.items()}


def _written(columns: dict, row: dict, folder: Path) -> dict:
    """A prompt's fields as JSON has them."""

    def plain(value):
        if isinstance(value, list):
            return [plain(part) for part in value]
        return os.path.relpath(Path(value.source).resolve(), folder.resolve()) if isinstance(value, LazyImage) else value

    given = {name for name, value in columns.items() if plain(value) is not value and plain(value) != value}
    return {f"input_{name}" if name in given and name in row else name: plain(value) for name, value in columns.items()}


def describe_signal(args, num_prompts: int, groups: dict[int, list[dict]], num_pairs: int) -> tuple[str, bool]:
    """What the prompts' rewards tell apart, in words, and whether they give any pair."""
    fates, gaps = Counter(), []
    for rows in groups.values():
        rewards = [row["reward"] for row in rows]
        gap = max(rewards) - min(rewards)
        if len(rewards) < 2:
            fates["fewer than two images with a reward"] += 1
        elif gap == 0:
            fates["equal rewards for all images"] += 1
        elif gap < args.min_margin:
            gaps.append(gap)
    if gaps:
        fates[f"rewards that differ by less than --min_margin {args.min_margin:g} (by {max(gaps):g} at most)"] = len(gaps)
    fates["no image with a reward"] += num_prompts - len(groups)
    told = "; ".join(f"{number} of {num_prompts} prompts have {fate}" for fate, number in fates.items() if number)
    return told, num_pairs > 0


def equal_images(folder: Path, jobs: Sequence[Job]) -> int:
    """How many images are the same file as an earlier one of their prompt."""
    seen: set[tuple[int, str]] = set()
    for job in jobs:
        seen.add((job[0], hashlib.sha256((folder / f"{file_name(job)}.png").read_bytes()).hexdigest()))
    return len(jobs) - len(seen)
