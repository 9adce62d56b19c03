"""Recipes: YAML files that hold the flags of a script."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..front_doors import find_recipe

NOT_IN_RECIPES = ("config", "help")


class RecipeError(ValueError):
    """A recipe that cannot be read; the message names the file, and the line where there is one."""


@dataclass(frozen=True)
class Given:
    """A value that was given for a flag, and where."""

    value: Any
    source: str
    is_recipe: bool = False

    @property
    def shown(self) -> str:
        """As whoever gave it would know it again."""
        if isinstance(self.value, bool) or self.value is None:
            return {True: "true", False: "false", None: "null"}[self.value]
        return " ".join(map(str, self.value)) if isinstance(self.value, list) else repr(self.value) if self.value == "" else str(self.value)


def read_recipe(path: str, flags: Collection[str]) -> dict[str, Given]:
    """The values of a recipe, with the line of each.

    Raises:
        RecipeError: there is no such file, it is no YAML mapping, or it has a key that is no flag or stands there twice.
    """
    try:
        file = find_recipe(path)
    except FileNotFoundError as error:
        raise RecipeError(str(error)) from error
    root = _composed(file)
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise RecipeError(f"{path}: a recipe is lines of `flag: value`, and this file is none")
    constructor, found = yaml.SafeLoader(""), {}
    for key, value in root.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in found:
            raise RecipeError(f"{path}, line {line}: {name} stands there a second time; first {found[name].source}")
        try:
            found[name] = Given(constructor.construct_object(value, deep=True), f"in {path}, line {line}", is_recipe=True)
        except yaml.YAMLError as error:
            raise RecipeError(f"{path}, line {line}: {name} is no plain value: {getattr(error, 'problem', error)}") from error
    if unknown := sorted(name for name in found if name not in flags or name in NOT_IN_RECIPES):
        lines = ", ".join(f"{name} {found[name].source.rpartition(', ')[2]}" for name in unknown)
        raise RecipeError(f"{path}: unknown keys {', '.join(unknown)} ({lines}); the keys are the script's flags, see --help")
    return found


def _composed(file: Path) -> yaml.Node | None:
    try:
        return yaml.compose(file.read_text(encoding="utf-8"), yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}: no text in UTF-8 (byte {error.start}); a recipe is a YAML file") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise RecipeError(f"{file}{f', line {mark.line + 1}' if mark else ''}: no YAML: {getattr(error, 'problem', None) or error}") from error
