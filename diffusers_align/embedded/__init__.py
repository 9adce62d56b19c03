"""Small models that ship with the package, trained on composed scenes: everything can be run on something real, offline."""

from pathlib import Path

_FOLDER = Path(__file__).parent
NAMES = ("mini-sd", "mini-sd3", "mini-clip", "scene-classifier", "scene-judge", "noisy-classifier", "noisy-clip")


def path(name: str) -> str:
    """The folder of an embedded model, for `from_pretrained`: `mini-sd`, `mini-sd3`, `mini-clip`, `scene-classifier`, `scene-judge`,
    `noisy-classifier`, `noisy-clip`.

    Raises:
        ValueError: there is no model of that name.
    """
    if name not in NAMES:
        raise ValueError(f"No embedded model {name!r}: there are {', '.join(NAMES)}.")
    return str(_FOLDER / name)


__all__ = ["NAMES", "path"]
