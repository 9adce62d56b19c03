"""The words of a command line and the two screens of help, from what the fields say (`options.py`)."""

from __future__ import annotations

import argparse
import re
import shutil
import textwrap
from typing import TYPE_CHECKING, Any

from .option_types import Kind

if TYPE_CHECKING:
    from .options import Option


def parser_of(options: dict[str, Option], gone: dict[str, Kind], description: str, program: str, everything: bool) -> argparse.ArgumentParser:
    """Reads words; what they mean is the fields' business.

    Args:
        options: the flags in the order of the help.
        gone: flags of the last version, which are read and not shown.
        description: one line.
        program: the script's name.
        everything: whether the help explains the advanced flags as well.
    """
    parser = argparse.ArgumentParser(
        prog=program,
        description=description.replace("%", "%%"),
        usage=f"%(prog)s [--config RECIPE] {' '.join(f'--{name} ...' for name, option in options.items() if option.is_required)} [--FLAG VALUE ...]",
        epilog=None if everything else _advanced(options),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--help_all", action="help", help="explain the advanced flags as well")
    groups: dict[str, Any] = {}
    for name, option in sorted(options.items(), key=lambda item: not item[1].is_required):
        heading = "required, here or in the recipe" if option.is_required else option.group
        group = groups.get(heading) or groups.setdefault(heading, parser.add_argument_group(heading))
        text = option.help() if everything or not option.advanced else argparse.SUPPRESS
        _add(group, name, option.kind, text, option.metavar)
    for name, kind in gone.items():
        _add(parser, name, kind, argparse.SUPPRESS)
    return parser


def _add(group: Any, name: str, kind: Kind, text: str, metavar: str | tuple[str, ...] | None = None) -> None:
    if kind.is_flag:
        group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=text)
    else:
        group.add_argument(f"--{name}", nargs=kind.nargs, metavar=metavar or kind.metavar(name), help=text)


def _advanced(options: dict[str, Option]) -> str | None:
    """The names of the flags that the first screen leaves out, by their groups."""
    groups: dict[str, list[str]] = {}
    for name, option in options.items():
        if option.advanced:
            groups.setdefault(option.group, []).append(f"--{name}")
    width = shutil.get_terminal_size().columns - 2
    lines = [
        textwrap.fill(f"{group}: {' '.join(names)}", width, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
        for group, names in groups.items()
    ]
    return "\n".join(["advanced (--help_all explains them):", *lines]).replace("%", "%%") if lines else None


def joined(argv: list[str], options: dict[str, Option]) -> list[str]:
    """`--flag -1e-4` as `--flag=-1e-4`: argparse would take some negative numbers for flags."""
    words: list[str] = []
    for word in argv:
        before = words[-1] if words else ""
        single = before.startswith("--") and before[2:] in options and options[before[2:]].kind.nargs is None and not options[before[2:]].kind.is_flag
        if single and re.match(r"-(\d|\.\d|inf|nan)", word, re.IGNORECASE):
            words[-1] = f"{before}={word}"
        else:
            words.append(word)
    return words


def as_flag(name: str, wanted: Any) -> str:
    """A flag with its value, as one would type it; a tuple is a choice of values."""
    if isinstance(wanted, bool):
        return f"--{name}" if wanted else f"--no-{name}"
    choices = wanted if isinstance(wanted, tuple) else (wanted,)
    return f"--{name} {' or '.join(str(choice) for choice in choices if choice is not None)}"


def shown(value: Any) -> str:
    """A value as one would type it."""
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else f"{value:g}" if isinstance(value, float) else str(value)
