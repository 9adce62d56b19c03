"""How well a recipe is known here: `verified`, `runs` or `parsed`. The one source is the curve that is committed for it.

A curve is `benchmarks/curves/NAME.json`, written by `python -m benchmarks.verify --record`: what every epoch of the recipe logged, with digests of the
recipe's settings and of the embedded models and prompts that it uses. Nobody writes a level down, so none can be out of date:

* `verified`: there is a curve of just these settings, models and prompts, and a later run reproduced it.
* `runs`: the recipe with these settings went from its start to its end, but the curve was not reproduced since, or the models or prompts have changed.
* `parsed`: nothing is committed for these settings; tests read the recipe with its script's flags.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shlex
from pathlib import Path
from typing import Any

import yaml

from .paths import find_recipe, folder, names

LEVELS = ("verified", "runs", "parsed")
# What a reward reads although no recipe names it.
BEHIND = {"scene_score": "scene-classifier", "scene_judge": "scene-judge"}
_PACKAGE = Path(__file__).parents[1]
_MADE_BY = "# Made by: "


def curve_file(recipe: str) -> Path:
    """Where the curve of a recipe is, or would be."""
    return folder("curves") / f"{recipe}.json"


def read_curve(recipe: str) -> dict[str, Any] | None:
    """The committed curve of a recipe; None if there is none.

    Raises:
        ValueError: the file is no curve.
    """
    path = curve_file(recipe)
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {name: found[name] for name in ("settings", "inputs", "machine", "metrics", "reproduced")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no curve ({type(error).__name__}: {error}). Write it anew: python -m benchmarks.verify --record {recipe}.") from error


def level(recipe: str) -> str:
    """One of `LEVELS`.

    Raises:
        FileNotFoundError: there is no such recipe.
        ValueError: its curve cannot be read.
    """
    curve = read_curve(recipe)
    if curve is None or curve["settings"] != settings_digest(recipe):
        return "parsed"
    if curve["inputs"] != inputs_of(recipe) or not curve["reproduced"].get("machines"):
        return "runs"
    return "verified" if curve["reproduced"]["curve"] == digest_of(curve["metrics"]) else "runs"


def script_of(recipe: str) -> str:
    """The script that a recipe belongs to: the one of the longest name that the recipe's begins with.

    Raises:
        ValueError: there is none.
    """
    stems = [name for name in names("training_scripts") if name.startswith("train_") and recipe.startswith(name.removeprefix("train_"))]
    if not stems:
        raise ValueError(f"The recipe {recipe!r} begins with no training script's name: there are {', '.join(names('training_scripts'))}.")
    return max(stems, key=len)


def made_by(recipe: str) -> list[list[str]]:
    """The commands that make a recipe's data, as its opening comment has them, each by its lines: from `# Made by: ` on, continued by lines that are
    indented. None where the recipe needs no data."""
    commands: list[list[str]] = []
    open_command = False
    for line in find_recipe(recipe).read_text(encoding="utf-8").splitlines():
        if line.startswith(_MADE_BY):
            commands.append([line.removeprefix(_MADE_BY)])
        elif open_command and line.startswith("#   "):
            commands[-1].append(line.removeprefix("#").strip())
        open_command = line.startswith(_MADE_BY) or (open_command and line.startswith("#   "))
    return commands


def settings_digest(recipe: str) -> str:
    """Of a recipe's values and of the commands that make its data; other comments do not count."""
    return digest_of([yaml.safe_load(find_recipe(recipe).read_text(encoding="utf-8")), made_by(recipe)])


def inputs_of(recipe: str) -> dict[str, str]:
    """The embedded models and the prompt sets of the package that a recipe or its data's commands name, with a digest of each."""
    settings = yaml.safe_load(find_recipe(recipe).read_text(encoding="utf-8"))
    words = {word for command in made_by(recipe) for word in shlex.split(" ".join(command))} | {str(value) for value in settings.values()}
    words |= {BEHIND[word] for word in words if word in BEHIND}
    return {name: content_digest(path) for name, path in sorted(_inputs().items()) if name in words}


@functools.cache
def _inputs() -> dict[str, Path]:
    """What a recipe may name: models by folder, prompt sets by file name without suffix."""
    models = {path.parent.name: path.parent for path in (_PACKAGE / "embedded").glob("*/*.json")}
    prompts = {path.stem: path for path in (_PACKAGE / "data" / "prompts").iterdir() if path.suffix != ".md"}
    return models | prompts


@functools.cache
def content_digest(path: Path) -> str:
    """SHA-256 of a file, or of all files in a folder with their names."""
    found = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file() and "__pycache__" not in file.parts:
            found.update(f"{file.relative_to(path).as_posix()}\n".encode())
            found.update(file.read_bytes())
    return found.hexdigest()


def digest_of(value: Any) -> str:
    """SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
