"""`diffusers-align list` and `path NAME`: where the scripts, recipes and pipelines of the package are; `diffusers-align plan`: what a run takes."""

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
    planner = commands.add_parser(
        "plan",
        help="the memory, denoiser rows and operations of a run, without weights, network or GPU",
        description="What a run takes, by running one batch of it on models without weights. All other flags are the script's.",
        usage="diffusers-align plan --config RECIPE [--gpu 24GB] [FLAGS OF THE SCRIPT]",
    )
    planner.add_argument("--gpu", help="the card's memory, such as 24GB: whether it fits, and which flags make it fit")
    planner.add_argument("--script", help="such as train_dpo; by the recipe's name if absent")
    args, others = parser.parse_known_args(argv)
    if args.command == "plan":
        _plan(parser, others, args.gpu, args.script)
        return
    if others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
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


def _plan(parser: argparse.ArgumentParser, argv: list[str], gpu: str | None, script: str | None) -> None:
    from .plan.command import planned  # torch and diffusers take seconds to import
    from .plan.report import report

    try:
        print(report(planned(argv, gpu, script)))
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))


def listed(kind: str) -> list[str]:
    """The lines of `diffusers-align list` for a kind: its names in one line, recipes in a line for each level."""
    if kind != "recipes" or not names(kind):
        return [f"{kind}: {', '.join(names(kind)) or 'none'}"]
    by_level = {name: level(name) for name in names(kind)}
    return [f"recipes, {wanted}: {', '.join(name for name in by_level if by_level[name] == wanted) or 'none'}" for wanted in LEVELS]


if __name__ == "__main__":
    main()
