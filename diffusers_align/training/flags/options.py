"""Typed flags: a class of documented, range-checked fields becomes the options of a script, and a recipe sets them by the same rules.

```python
class FlowGRPOArguments(GroupArguments, TaskArguments, defaults={"rank": 16}):
    \"\"\"Flow-GRPO\"\"\"  # the heading of its group in --help

    clip_range: Positive = option(1e-4, "of the ratio per dimension")
    kl_form: Literal["official", "gaussian"] = option("official", "which KL", needs={"kl_weight": True})

args = parse(FlowGRPOArguments, argv, __doc__)
```

Every field has a type, a range where it is a number, and a line of help. pydantic checks values of the command line and of the recipe
alike; numbers are finite. Conditions between fields are `model_validator`s beside the fields, which raise `ValueError` with a sentence
that names the flags; `needs` says what a flag is without effect without; `advanced` keeps it off the first screen of `--help`.

A flag that has a new name says the old one in `was`. Where the meaning changed too, the class lists the old flags with their types, and a
method turns values under old names into values under new ones:

```python
class FlowGRPOArguments(GroupArguments, TaskArguments, gone={"random_timesteps": bool}):
    @classmethod
    def from_old(cls, given: dict[str, Any]) -> dict[str, Any]:
        if given.pop("random_timesteps", False):
            given.setdefault("random_timestep_fraction", given.pop("timestep_fraction", 0.99))
        return given
```

Old names are taken for one version, with a warning: on the command line, in recipes, and quietly in checkpoints (`old_names.py`).
"""

from __future__ import annotations

import argparse
import functools
import re
import shlex
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Interval
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from .command_line import as_flag, joined, parser_of, shown
from .old_names import OldNames, warn
from .option_types import Kind, kind_of
from .recipes import Given, read_recipe, suggestion

# Above these a number means nothing, or no longer fits into float32 when it is squared.
MANY, LARGE = 10**9, 1e9

Count = Annotated[int, Interval(ge=1, le=MANY)]
Steps = Annotated[int, Interval(ge=1, le=1000)]
StepIndex = Annotated[int, Interval(ge=0, le=1000)]
Pixels = Annotated[int, Interval(ge=8, le=16384)]
Rank = Annotated[int, Interval(ge=1, le=4096)]
Seed = Annotated[int, Interval(ge=0, le=2**32 - 1)]
Real = Annotated[float, Interval(ge=-LARGE, le=LARGE)]
Positive = Annotated[float, Interval(gt=0, le=LARGE)]
NonNegative = Annotated[float, Interval(ge=0, le=LARGE)]
Probability = Annotated[float, Interval(ge=0, le=1)]
PositiveShare = Annotated[float, Interval(gt=0, le=1)]
Decay = Annotated[float, Interval(ge=0, lt=1)]
Guidance = Annotated[float, Interval(ge=0, le=1000)]

# The modules whose flags are for many scripts; those of a method or a script are its own.
COMMON = ("common", "data", "model", "options", "task")

# What a change means for a run that goes on from a checkpoint. "learned": it decides what is learned, so it is refused; "content": so do the files
# that it names; "takes effect" from there on, and is said; "measured": decides what is measured, so it is refused only where an early stop looks;
# "free": decides neither, and is said; "unsaid": differs in every resumed run; "secret": checkpoints do not keep it.
Resume = Literal["learned", "content", "takes effect", "measured", "free", "unsaid", "secret"]


def option(
    default: Any,
    text: str,
    *,
    needs: dict[str, Any] | None = None,
    metavar: str | tuple[str, ...] | None = None,
    advanced: bool | None = None,
    was: str | tuple[str, ...] | None = None,
    resume: Resume | None = None,
    of: str | None = None,
) -> Any:
    """A field of an `Arguments` class. What the last four do not say is as the base classes' field of that name has it.

    Args:
        default: None where the flag may be absent and the text says what happens then, in a part of its own (`; ... if absent`), which is not shown
            where a class has a default of its own.
        text: its help; the range and the default are added.
        needs: other flags with the values (one, or a tuple) without which this one has no effect; True is any but 0, false and absent.
        metavar: what stands for the value in the help.
        advanced: whether `--help` only names it, and `--help_all` explains it.
        was: the name, or names, that it had in the last version.
        resume: what a change means for a run that goes on from a checkpoint (`Resume`); if nobody says, it is refused.
        of: the flag whose value it is about. Where the command line gives another value than the recipe, this one of the recipe is left out, and that is said.
    """
    said = {"advanced": advanced, "was": was, "resume": resume, "of": of}
    extra = {"needs": needs or {}, "metavar": metavar, **{word: value for word, value in said.items() if value is not None}}
    return Field(default, description=text, json_schema_extra=extra)


def required(text: str, **said: Any) -> Any:
    """A field that the command line or the recipe must give; the keywords are those of `option`."""
    field = option(None, text, **said)
    return Field(description=text, json_schema_extra=field.json_schema_extra)


class Arguments(BaseModel):
    """run"""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, str_min_length=1, coerce_numbers_to_str=True, protected_namespaces=(), defer_build=True)

    config: str | None = option(None, "YAML recipe: its values replace the defaults, flags on the command line replace its values", resume="unsaid")
    _command: str = PrivateAttr("")
    _gone: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__()  # the keywords are for the hook below

    @classmethod
    def __pydantic_init_subclass__(
        cls,
        defaults: dict[str, Any] | None = None,
        needs: dict[str, dict[str, Any]] | None = None,
        advanced: Collection[str] = (),
        basic: Collection[str] = (),
        gone: dict[str, Any] | None = None,
        **others: dict[str, Any],
    ) -> None:
        """Class keywords, for inherited fields: other `defaults`, what more they need to have an effect, which are `advanced` (or `basic`) here,
        and other `was` and `resume` (see `option`). `gone` are flags of the last version, by type, that `from_old` reads."""
        fields = cls.__pydantic_fields__
        said: dict[str, dict[str, Any]] = {name: {"advanced": name in advanced} for name in (*advanced, *basic)}
        for word, values in others.items():
            if word not in ("was", "resume"):
                raise TypeError(f"{cls.__name__}: unknown class keyword {word}")
            for name, value in values.items():
                said.setdefault(name, {})[word] = value
        for name, value in (defaults or {}).items():
            fields[name].default = value
        for name, more in (needs or {}).items():
            said.setdefault(name, {})["needs"] = {**(fields[name].json_schema_extra or {}).get("needs", {}), **more}
        for name, more in said.items():
            fields[name].json_schema_extra = {**(fields[name].json_schema_extra or {}), **more}
        cls._gone = {**cls._gone, **(gone or {})}

    @classmethod
    def from_old(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Values under today's names, from values of which some are under the old names of `gone`; raises ValueError where they contradict."""
        return given

    @property
    def command(self) -> str:
        """The command line that makes this run, for the model card: without the token."""
        return self._command

    def given(self, name: str) -> bool:
        """Whether the command line or the recipe says so."""
        return name in self.model_fields_set and getattr(self, name) is not None


class Option:
    """What a field says about its flag.

    Attributes:
        kind: its type and range.
        text, needs, metavar, advanced, was, resume, of: of `option`, by the class that said them last.
        group: the heading under which its first class puts it.
        owner: its first class.
        is_common: whether that class is one for many scripts (`COMMON`), not of a method or a script.
    """

    def __init__(self, arguments: type[Arguments], name: str):
        field, classes = arguments.model_fields[name], _declaring(arguments, name)
        told = next((f for f in (field, *(c.model_fields[name] for c in classes)) if f.description), field)
        self.name, self.default, self.is_required = name, field.default, field.is_required()
        self.kind: Kind = kind_of(field.annotation, field.metadata)
        extra: dict[str, Any] = {}
        for owner in (cls for cls in reversed(arguments.__mro__) if name in getattr(cls, "model_fields", {})):
            extra |= owner.model_fields[name].json_schema_extra or {}
        self.text, self.needs, self.metavar = told.description or "", extra.get("needs") or {}, extra.get("metavar")
        self.advanced, self.resume, self.of = bool(extra.get("advanced")), extra.get("resume", "learned"), extra.get("of")
        was = extra.get("was", ())
        self.was: tuple[str, ...] = (was,) if isinstance(was, str) else was
        self.owner = classes[-1]
        self.group = (self.owner.__doc__ or self.owner.__name__).splitlines()[0]
        self.is_common = self.owner.__module__.removeprefix(f"{__package__}.") in COMMON

    def help(self) -> str:
        """The line of `--help`: what it is, what it may be, what it is by default."""
        notes = [self.kind.range] if self.kind.range else []
        notes += ["with " + " ".join(as_flag(name, wanted) for name, wanted in self.needs.items())] if self.needs else []
        notes += ["required"] if self.is_required else [] if self.default in (None, {}) else [f"default: {shown(self.default)}"]
        text = self.text if self.default is None else re.sub(r"; [^;]*\bif absent\b[^;]*", "", self.text)
        return (text + (f" ({'; '.join(notes)})" if notes else "")).replace("%", "%%")


@functools.cache
def options_of(arguments: type[Arguments]) -> dict[str, Option]:
    """All flags of a script, those of its own class first."""
    place = {name: number for number, cls in enumerate(arguments.__mro__) for name in cls.__dict__.get("__annotations__", {})}
    return {name: Option(arguments, name) for name in sorted(arguments.model_fields, key=place.__getitem__)}


def _declaring(arguments: type[Arguments], name: str) -> list[type[Arguments]]:
    """The classes that have the field in their own body, the first of them last."""
    return [cls for cls in arguments.__mro__ if name in cls.__dict__.get("__annotations__", {})]


def parse(arguments: type[Arguments], argv: list[str] | None = None, description: str | None = None) -> Any:
    """The arguments of a script, from its command line and the recipe that it names; nothing is loaded for it.

    Exits with status 2 and a sentence (argparse's convention) on an unknown flag, a recipe that cannot be read, a value out of its range,
    flags that contradict each other or have no effect together.

    Args:
        arguments: the class of its flags.
        argv: the words of the command line; those of the process if absent.
        description: of the script; its first line is shown.
    """
    argv, options, old = sys.argv[1:] if argv is None else argv, options_of(arguments), old_names_of(arguments)
    parser = _parser(arguments, description, Path(sys.argv[0]).name, "--help_all" in argv)
    try:
        argv = old.words(argv)
        words, unknown = parser.parse_known_args(joined(argv, options))
        if unknown:
            near = suggestion(unknown[0].partition("=")[0], {f"--{name}": f"--{new}" for name, new in old.today.items()})
            parser.error(f"unrecognized arguments: {' '.join(unknown)}{near}")
        given = {name: Given(value, "on the command line") for name, value in vars(words).items()}
        if "config" in given:
            recipe = old.recipe(read_recipe(given["config"].value, old.today))
            given = {**_without_strangers(options, recipe, given), **given}
        given = old.converted(given)
    except ValueError as error:
        parser.error(str(error))
    args = _validated(parser, arguments, options, given)
    _refuse_void(parser, options, given, args)
    args._command = _command(argv)
    return args


@functools.cache
def old_names_of(arguments: type[Arguments]) -> OldNames:
    """The names that a script's flags had in the last version."""
    return OldNames(
        {old: name for name, option in options_of(arguments).items() for old in option.was}, arguments._gone, arguments.from_old, options_of(arguments)
    )


@functools.cache
def _parser(arguments: type[Arguments], description: str | None, program: str, everything: bool) -> argparse.ArgumentParser:
    gone = {name: kind_of(annotation) for name, annotation in arguments._gone.items()}
    return parser_of(options_of(arguments), gone, (description or "").strip().partition("\n")[0], program, everything)


def _without_strangers(options: dict[str, Option], recipe: dict[str, Given], words: dict[str, Given]) -> dict[str, Given]:
    """A recipe's values but those that are about a value of it which the command line replaces; which ones is said."""
    gone = []
    for name in (name for name in recipe if name not in words):
        of = options[name].of if name in options else None
        if of in recipe and of in words and words[of].value != recipe[of].for_text():
            gone.append(name)
            theirs = f"is for the recipe's --{of} {recipe[of].shown}"
            warn(f"--{name} {recipe[name].shown} ({recipe[name].source}) {theirs}, so it is left out with {words[of].shown}.")
    return {name: value for name, value in recipe.items() if name not in gone}


def _validated(parser: argparse.ArgumentParser, arguments: type[Arguments], options: dict[str, Option], given: dict[str, Given]) -> Arguments:
    values = {}
    for name, entry in given.items():
        try:
            kind = options[name].kind
            values[name] = kind.prepared(entry.for_text() if kind.type is str else entry.value)
        except ValueError as error:
            parser.error(_refusal(options[name], entry, str(error)))
    try:
        return arguments(**values)
    except ValidationError as errors:
        parser.error("\n".join(dict.fromkeys(_sentence(error, options, given) for error in errors.errors())))


def _sentence(error: dict[str, Any], options: dict[str, Option], given: dict[str, Given]) -> str:
    if not error["loc"]:
        return str(error["ctx"]["error"])  # of a model_validator
    name = str(error["loc"][0])
    if error["type"] == "missing" and len(error["loc"]) == 1:
        return f"--{name} is required (on the command line or in the recipe)"
    return _refusal(options[name], given[name], str(error["ctx"]["error"]) if error["type"] == "value_error" else None)


def _refusal(option: Option, entry: Given, why: str | None) -> str:
    why = why or f"must be {option.kind.describe}"
    near = suggestion(entry.value, option.kind.choices) if isinstance(entry.value, str) else ""
    return f"--{option.name} {why}, got {entry.shown}{near} ({entry.source})"


def _refuse_void(parser: argparse.ArgumentParser, options: dict[str, Option], given: dict[str, Given], args: Arguments) -> None:
    """A flag that is given and changes nothing is a mistake of whoever gave it."""
    for name, entry in given.items():
        unmet = {other: wanted for other, wanted in options[name].needs.items() if not _meets(getattr(args, other), wanted)}
        if not unmet or _asks_for_nothing(getattr(args, name), options[name].default):
            continue
        needed = " and ".join(as_flag(other, wanted) for other, wanted in unmet.items())
        overridden = entry.is_recipe and any(other in given and not given[other].is_recipe for other in unmet)
        if not overridden:
            parser.error(f"--{name} has no effect without {needed}: leave it out, or give both; got {entry.shown} ({entry.source})")
        warn(f"--{name} {entry.shown} ({entry.source}) has no effect without {needed}.")
        setattr(args, name, options[name].default)


def _asks_for_nothing(value: Any, default: Any) -> bool:
    """Whether a value is that something is not there, which is true without it: a switch that is off, a weight of 0 that is absent by default. A 0 in the
    place of another number asks for something."""
    return value is None or (not value and (isinstance(value, bool) or default is None or value == default))


def _meets(value: Any, wanted: Any) -> bool:
    if wanted is True:
        return bool(value)
    return value in (wanted if isinstance(wanted, tuple) else (wanted,))


def _command(argv: list[str]) -> str:
    kept = [word for before, word in zip(["", *argv], argv) if not word.startswith("--hub_token") and before != "--hub_token"]
    return shlex.join(["accelerate", "launch", sys.argv[0], *kept])
