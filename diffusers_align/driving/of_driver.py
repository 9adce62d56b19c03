"""Parts of a driver that remember what they have found out about its pipeline."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .driver import Driver


class OfDriver:
    """A part that refers to its driver, but does not keep it: a driver without users is freed at once, with the prompts that it remembers."""

    def __init__(self, driver: Driver):
        self._driver = weakref.ref(driver)

    @property
    def driver(self) -> Driver:
        return self._driver()

    # Copies and pickles of a driver have parts of their own.

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_driver": self.driver}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _driver=weakref.ref(state["_driver"]))
