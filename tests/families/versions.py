"""What a result depends on: the versions of the libraries, and this source tree."""

from __future__ import annotations

import hashlib
from importlib.metadata import version

from .cell import ROOT

LIBRARIES = ("diffusers", "transformers", "peft", "torch")


def versions() -> dict[str, str]:
    return {name: version(name) for name in LIBRARIES}


def source() -> str:
    """A short name of the state of the package and the columns; cases are left out, which concern their own rows alone."""
    digest = hashlib.sha256()
    for folder in ("diffusers_align", "tests/families"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.parent.name != "cases":
                digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]
