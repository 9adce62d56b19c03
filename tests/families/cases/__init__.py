"""The cases by pipeline class, a file for each group of families.

Each module here has `CASES`, a list of cases by the name of their pipeline's class, and `ABSENT`, classes that cannot be built offline with the reason.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from ..case import Case

_MODULES = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]


def _merged(attribute: str) -> dict:
    merged: dict = {}
    for module in _MODULES:
        own = getattr(module, attribute)
        if twice := sorted(set(own) & set(merged)):
            raise ValueError(f"{module.__name__}: {', '.join(twice)} has an entry in another module too.")
        merged |= own
    return merged


CASES: dict[str, list[Case]] = _merged("CASES")
ABSENT: dict[str, str] = _merged("ABSENT")
