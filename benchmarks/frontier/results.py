"""Results: a JSON line for each evaluated model, which is written once and read ever after."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

from diffusers_align.files.levels import content_digest

KEY = ("task", "model", "method", "budget", "seed", "guidance", "judge", "images", "settings")
PACKAGE = Path(__file__).parents[2] / "diffusers_align"


class Results:
    """The lines of a file, by what was judged. A line that a kill has torn is left out, and judged again."""

    def __init__(self, path: Path):
        self.path, self.rows = path, {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            self.rows[self.key(row)] = row

    @staticmethod
    def key(row: dict) -> tuple:
        """What tells a line from the others, the models' weights and the method's settings included: results of others are other results."""
        return (*(row[name] for name in KEY), row["weights"])

    def __contains__(self, row: dict) -> bool:
        return self.key(row) in self.rows

    def add(self, row: dict) -> None:
        """Append a line. NaN, which JSON does not have, becomes null."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torn = self.path.is_file() and not self.path.read_bytes().endswith(b"\n") and self.path.stat().st_size
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if torn else "") + json.dumps(without_nan(row)) + "\n")
        self.rows[self.key(row)] = without_nan(row)

    def all(self) -> list[dict]:
        return list(self.rows.values())


def without_nan(row: dict) -> dict:
    """None in the place of NaN."""
    return {name: without_nan(v) if isinstance(v, dict) else None if isinstance(v, float) and math.isnan(v) else v for name, v in row.items()}


def weights_of(model: str, specs: list[str]) -> str:
    """A digest of the pretrained model and of what rewards and judges read, by NAME@MODEL."""
    folders = {model, *(spec.partition("@")[2] for spec in specs), *(["scene-classifier"] if "scene_score" in specs else [])}
    paths = [PACKAGE / "embedded" / name if (PACKAGE / "embedded" / name).is_dir() else Path(name) for name in sorted(folders) if name]
    return hashlib.sha256("".join(content_digest(path) for path in paths if path.exists()).encode()).hexdigest()[:16]
