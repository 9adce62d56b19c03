"""Where the files that users hand to diffusers or to accelerate lie: beside the package in a checkout, inside it in a wheel."""

from __future__ import annotations

import difflib
from pathlib import Path

KINDS = ("pipelines", "schedulers", "training_scripts", "recipes")
_PACKAGE = Path(__file__).parents[1]


def folder(kind: str) -> Path:
    """The folder of `pipelines`, `schedulers`, `training_scripts`, the scripts' `recipes`, or the `curves` of recipes that were run."""
    if kind == "recipes":
        return folder("training_scripts") / kind
    bundled = _PACKAGE / "shipped" / kind
    return bundled if bundled.is_dir() else _PACKAGE.parent / ("benchmarks/curves" if kind == "curves" else kind)


def names(kind: str) -> list[str]:
    """What can be asked for: scripts, pipelines and recipes by file name, schedulers and modular blocks by folder."""
    if not folder(kind).is_dir():
        return []
    if kind == "schedulers":
        return sorted(p.name for p in folder(kind).iterdir() if p.is_dir() and not p.name.startswith(("_", ".")))
    suffix = ".yaml" if kind == "recipes" else ".py"
    blocks = {p.parent.name for p in folder(kind).glob("*/modular_config.json")}
    return sorted(blocks | {p.stem for p in folder(kind).glob(f"*{suffix}") if not p.name.startswith("_")})


def front_door(kind: str, name: str) -> Path:
    """Path of a script, a pipeline file, a recipe or a scheduler's folder.

    Raises:
        FileNotFoundError: there is none of that name; the message lists those there are.
    """
    for candidate in (folder(kind) / f"{name}.py", folder(kind) / f"{name}.yaml", folder(kind) / name):
        if candidate.exists():
            return candidate
    raise FileNotFoundError(f"No {name!r} among {kind}: there are {', '.join(names(kind)) or 'none'}.")


def find_recipe(name: str) -> Path:
    """The recipe that `--config` names: a file, or one of the package by its name or by its path in a checkout.

    `ddpo_mini_sd`, `ddpo_mini_sd.yaml` and `training_scripts/recipes/ddpo_mini_sd.yaml` are the same recipe, wherever the package lies.

    Raises:
        FileNotFoundError: it is neither, or a folder; the message names those that are near.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    shipped = folder("recipes") / f"{path.name.removesuffix('.yaml').removesuffix('.yml')}.yaml"
    if shipped.is_file() and path.parts[:-1] in ((), ("training_scripts", "recipes"), ("recipes",)):
        return shipped
    near = difflib.get_close_matches(shipped.stem, names("recipes"), n=3)
    hint = f" Did you mean {', '.join(near)}?" if near else ""
    if path.is_dir():
        raise FileNotFoundError(f"no recipe {name!r}: it is a folder. Name a YAML file in it.")
    raise FileNotFoundError(f"no recipe {name!r}: no such file, and none of that name in the package.{hint} `diffusers-align list recipes` names them all.")
