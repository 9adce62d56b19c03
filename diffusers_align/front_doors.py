"""Where the files that users hand to diffusers or to accelerate lie: beside the package in a checkout, inside it in a wheel."""

from __future__ import annotations

from pathlib import Path

KINDS = ("pipelines", "schedulers", "training_scripts")
_PACKAGE = Path(__file__).parent


def folder(kind: str) -> Path:
    """The folder of `pipelines`, `schedulers` or `training_scripts`."""
    bundled = _PACKAGE / "front_doors_data" / kind
    return bundled if bundled.is_dir() else _PACKAGE.parent / kind


def names(kind: str) -> list[str]:
    """What can be asked for: scripts and pipelines by file name, schedulers by recipe."""
    if not folder(kind).is_dir():
        return []
    return sorted(p.stem for p in folder(kind).iterdir() if (p.suffix == ".py" or p.is_dir()) and not p.name.startswith(("_", ".")))


def front_door(kind: str, name: str) -> Path:
    """Path of a script, pipeline file or recipe folder.

    Raises:
        FileNotFoundError: there is none of that name; the message lists those there are.
    """
    for candidate in (folder(kind) / f"{name}.py", folder(kind) / name):
        if candidate.exists():
            return candidate
    raise FileNotFoundError(f"No {name!r} among {kind}: there are {', '.join(names(kind)) or 'none'}.")
