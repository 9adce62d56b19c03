"""Recipes: YAML files that hold the flags of a script."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ...files.paths import find_recipe

NOT_IN_RECIPES = ("config", "help")


class RecipeError(ValueError):
    """A recipe that cannot be read; the message names the file, and the line where there is one."""


@dataclass(frozen=True)
class Given:
    """A value that was given for a flag, and where.

    Attributes:
        written: the text or texts that a recipe has for it, which YAML may have read as another thing: 0123 as a number.
    """

    value: Any
    source: str
    is_recipe: bool = False
    written: str | list[str] | None = None

    def for_text(self) -> Any:
        """The value where text is wanted."""
        return self.value if self.written is None else self.written

    @property
    def shown(self) -> str:
        """As whoever gave it would know it again."""
        if isinstance(self.value, bool) or self.value is None:
            return {True: "true", False: "false", None: "null"}[self.value]
        words = self.value if isinstance(self.value, list) else [self.value]
        return " ".join(str(word) or "''" for word in words)


def suggestion(word: str, names: Collection[str] | Mapping[str, str]) -> str:
    """` (did you mean NAME?)`, or nothing where no name is near; a mapping says what to suggest for a name that is near."""
    near = difflib.get_close_matches(word, list(names), n=1, cutoff=0.75)
    return f" (did you mean {names[near[0]] if isinstance(names, Mapping) else near[0]}?)" if near else ""


def read_recipe(name: str, flags: Mapping[str, str]) -> dict[str, Given]:
    """The values of a recipe, with the line of each.

    Args:
        name: a file, or the name of a recipe that the package ships.
        flags: the keys that it may have, those of the last version among them, with what they are called today.

    Raises:
        RecipeError: there is no such file, it is no YAML mapping, or it has a key that is no flag or stands there twice.
    """
    try:
        path = find_recipe(name)
    except FileNotFoundError as error:
        raise RecipeError(str(error)) from error
    root = _composed(path)
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise RecipeError(f"{path}: a recipe is lines of `flag: value`, and this file is none")
    constructor, found = yaml.SafeLoader(""), {}
    for key, value in root.value:
        flag, line = str(key.value), key.start_mark.line + 1
        if flag in found:
            raise RecipeError(f"{path}, line {line}: {flag} stands there a second time; first {found[flag].source}")
        try:
            found[flag] = Given(constructor.construct_object(value, deep=True), f"in {path}, line {line}", is_recipe=True, written=_written(value))
        except yaml.YAMLError as error:
            raise RecipeError(f"{path}, line {line}: {flag} is no plain value: {getattr(error, 'problem', error)}") from error
    today = {flag: name for flag, name in flags.items() if flag not in NOT_IN_RECIPES}
    if unknown := sorted(flag for flag in found if flag not in today):
        where = "; ".join(f"{flag} in {found[flag].source.rpartition(', ')[2]}{suggestion(flag, today)}" for flag in unknown)
        raise RecipeError(f"{path}: unknown keys: {where}. The keys are the script's flags, see --help_all")
    return found


def _written(node: yaml.Node) -> str | list[str] | None:
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag.endswith((":null", ":bool")) else node.value
    items = [_written(item) for item in node.value] if isinstance(node, yaml.SequenceNode) else [None]
    return items if all(isinstance(item, str) for item in items) else None


def _composed(file: Path) -> yaml.Node | None:
    try:
        return yaml.compose(file.read_text(encoding="utf-8"), yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}: no text in UTF-8 (byte {error.start}); a recipe is a YAML file") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise RecipeError(f"{file}{f', line {mark.line + 1}' if mark else ''}: no YAML: {getattr(error, 'problem', None) or error}") from error
