"""`diffusers-align list` and `diffusers-align path NAME`: where the scripts, recipes and pipelines of the package are."""

from __future__ import annotations

import argparse
import difflib

from . import __version__
from .files.levels import LEVELS, level
from .files.paths import KINDS, folder, front_door, names


def main(argv: list[str] | None = None) -> None:
    """Print what there is, or the path of one: `accelerate launch $(diffusers-align path train_ddpo) --help`."""
    parser = argparse.ArgumentParser(prog="diffusers-align", description=__doc__)
    parser.add_argument("--version", action="version", version=f"diffusers-align {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    lister = commands.add_parser(
        "list",
        help="names of all scripts, recipes, scheduler recipes and pipelines",
        description="Names of what there is. Recipes by how far they are known: verified (a committed curve was reproduced), runs (went from start to end "
        "with these settings), parsed (read by tests).",
    )
    lister.add_argument("kind", nargs="?", choices=KINDS, help="of these alone")
    path = commands.add_parser("path", help="the path of one of them, or of the folder of a kind")
    path.add_argument("name", help=f"a name that `list` shows, or one of {', '.join(KINDS)}")
    args = parser.parse_args(argv)
    if args.command == "list":
        for kind in [args.kind] if args.kind else KINDS:
            print("\n".join(listed(kind)))
        return
    if args.name in KINDS:
        print(folder(args.name))
        return
    for kind in KINDS:
        if args.name.removesuffix(".py").removesuffix(".yaml") in names(kind):
            print(front_door(kind, args.name.removesuffix(".py").removesuffix(".yaml")))
            return
    near = difflib.get_close_matches(args.name, [name for kind in KINDS for name in names(kind)], n=3)
    hint = f" (did you mean {', '.join(near)}?)" if near else ""
    parser.error(f"no {args.name!r}{hint}; `diffusers-align list` shows what there is")


def listed(kind: str) -> list[str]:
    """The lines of `diffusers-align list` for a kind: its names in one line, recipes in a line for each level."""
    if kind != "recipes" or not names(kind):
        return [f"{kind}: {', '.join(names(kind)) or 'none'}"]
    by_level = {name: level(name) for name in names(kind)}
    return [f"recipes, {wanted}: {', '.join(name for name in by_level if by_level[name] == wanted) or 'none'}" for wanted in LEVELS]


if __name__ == "__main__":
    main()
