"""`diffusers-align list` and `diffusers-align path NAME`: where the scripts, recipes and pipelines of the package are."""

from __future__ import annotations

import argparse

from .front_doors import KINDS, front_door, names


def main(argv: list[str] | None = None) -> None:
    """Print what there is, or the path of one: `accelerate launch $(diffusers-align path train_ddpo) --help`."""
    parser = argparse.ArgumentParser(prog="diffusers-align", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="names of all scripts, scheduler recipes and pipelines")
    path = commands.add_parser("path", help="the path of one of them")
    path.add_argument("name")
    args = parser.parse_args(argv)
    if args.command == "list":
        for kind in KINDS:
            print(f"{kind}: {', '.join(n for n in names(kind) if n != 'recipes') or 'none yet'}")
        return
    for kind in KINDS:
        if args.name in names(kind):
            print(front_door(kind, args.name))
            return
    parser.error(f"no {args.name!r}; `diffusers-align list` shows what there is")


if __name__ == "__main__":
    main()
