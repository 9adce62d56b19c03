"""Flags under the names that they had in the last version: on the command line, in recipes and in checkpoints."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from .command_line import as_flag
from .recipes import Given

END = "the old name goes with version 0.2.0."


@functools.cache
def warn(text: str) -> None:
    """Say it on stderr, once per process: a script reads its flags before its heavy imports and again after them."""
    print(text, file=sys.stderr)


@dataclass(frozen=True)
class OldNames:
    """The old names of a script's flags.

    Attributes:
        renames: old name to new name, where nothing but the name changed.
        gone: flags that `convert` reads.
        convert: `Arguments.from_old`.
        flags: today's names.
    """

    renames: dict[str, str]
    gone: Collection[str]
    convert: Callable[[dict[str, Any]], dict[str, Any]]
    flags: Collection[str]

    def __post_init__(self):
        if both := sorted({*self.renames, *self.gone} & set(self.flags)):
            raise TypeError(f"--{both[0]} is a flag and the old name of one: which is meant?")

    @property
    def today(self) -> dict[str, str]:
        """All names, of today and of the last version, with what they are called today; those that are gone are not called anything else."""
        return {**{name: name for name in (*self.flags, *self.gone)}, **self.renames}

    def words(self, argv: list[str]) -> list[str]:
        """A command line under today's names, and a warning for each old one.

        Raises:
            ValueError: a flag is given under both names.
        """
        heads = [word.partition("=")[0] for word in argv]
        found = []
        for word, head in zip(argv, heads):
            no, old = ("--no-", head[5:]) if head.startswith("--no-") else ("--", head[2:])
            if not head.startswith("--") or old not in self.renames:
                found.append(word)
                continue
            new = self.renames[old]
            self._check(old, new, {name[2:].removeprefix("no-") for name in heads if name.startswith("--")})
            warn(f"--{old} is now called --{new}; {END}")
            found.append(f"{no}{new}{word[len(head) :]}")
        return found

    def recipe(self, given: dict[str, Given]) -> dict[str, Given]:
        """The values of a recipe under today's names, and a warning for each old one.

        Raises:
            ValueError: a flag is given under both names.
        """
        for old in self.renames.keys() & given.keys():
            warn(f"{old} ({given[old].source}) is now called {self.renames[old]}; {END}")
        return self._renamed(given)

    def converted(self, given: dict[str, Given]) -> dict[str, Given]:
        """The flags that are gone, turned into today's by `convert`, and a warning for each.

        Raises:
            ValueError: they contradict others.
        """
        if not (old := [name for name in self.gone if name in given]):
            return given
        values = self.convert({name: entry.value for name, entry in given.items()})
        changed = {name: value for name, value in values.items() if name not in given or value != given[name].value}
        meant = " ".join(as_flag(name, value) for name, value in changed.items()) or "the default"
        for name in old:
            warn(f"--{name} ({given[name].source}) is no flag any more and is read as {meant}; {END}")
        made = {name: Given(value, given[old[0]].source, given[old[0]].is_recipe) for name, value in changed.items()}
        return {**{name: entry for name, entry in given.items() if name in values}, **made}

    def kept(self, flags: dict[str, Any]) -> dict[str, Any]:
        """The flags that a checkpoint keeps, under today's names."""
        flags = {name: value for name, value in flags.items() if name not in self.renames or self.renames[name] not in flags}
        flags = self._renamed(flags)
        return self.convert(dict(flags)) if any(name in flags for name in self.gone) else flags

    def _renamed(self, values: dict[str, Any]) -> dict[str, Any]:
        for old in self.renames.keys() & values.keys():
            self._check(old, self.renames[old], values)
        return {self.renames.get(name, name): value for name, value in values.items()}

    def _check(self, old: str, new: str, names: Collection[str]) -> None:
        rivals = [name for name in names if name != old and (name == new or self.renames.get(name) == new)]
        if rivals:
            raise ValueError(f"--{old} is the old name of --{new}: give it once, got --{old} and --{rivals[0]}")
