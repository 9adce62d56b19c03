"""Which `--column_map` reads a data set whose columns no known layout has: by what the columns are called."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Other names of the columns that layouts of plain rows need, as words that columns are called by or hold.
WORDS = {
    "prompt": {"prompt", "caption", "text", "instruction", "query", "description", "words"},
    "chosen": {"chosen", "winner", "win", "preferred", "better", "best", "good", "positive", "pos", "accepted", "w"},
    "rejected": {"rejected", "loser", "lose", "dispreferred", "worse", "worst", "bad", "negative", "neg", "l"},
    "image_0": {"left", "a", "0", "first", "one"},
    "image_1": {"right", "b", "1", "second", "two"},
    "label_0": {"label", "preference", "choice", "score", "vote"},
    "image": {"image", "img", "picture", "photo", "file", "path", "completion"},
    "label": {"label", "liked", "like", "desirable", "preference", "good"},
    "reward": {"reward", "score", "rating", "points"},
    "images": {"images", "pictures", "files", "generations"},
    "ranks": {"ranks", "rank", "ranking", "order"},
}


def column_map_for(columns: Sequence[str], layouts: Sequence[tuple[str, ...]]) -> dict[str, str] | None:
    """{name: column} of the first of `layouts` (the names that each needs) whose every name has a column of its own; None if there is none."""
    for needs in layouts:
        found: dict[str, str] = {}
        for name in needs:
            near = [column for column in columns if column == name] or [column for column in columns if _words(column) & WORDS.get(name, set())]
            free = [column for column in near if column not in found.values()]
            if not free:
                break
            found[name] = free[0]
        else:
            return found
    return None


def _words(column: str) -> set[str]:
    """`imageWinner_0` as {image, winner, 0}."""
    return set(re.findall(r"[a-z]+|\d+", re.sub(r"([a-z])([A-Z])", r"\1 \2", column).lower()))
