"""The alignment frontier on the embedded models: what each method gains, what it pays for it, and whether controls gain as much.

    python -m benchmarks.frontier search --tasks color --minutes 60
    python -m benchmarks.frontier run --tasks color swaps --models mini-sd3 --budgets 2000 8000 --seeds 0 1 2 --minutes 240
    python -m benchmarks.frontier report
    python -m benchmarks.frontier samples
    python -m benchmarks.frontier publish

`search` tries the same factors of the recipe's learning rate and strength for each method, at the smallest budget, on training prompts and by the reward
alone, and freezes the best; `run` trains and judges; `report` writes tables and pictures into the output folder; `samples` draws what the weights there
make of the same prompts and seeds; `publish` puts all of it into the repository (benchmarks/frontier/results.jsonl and frozen.json, docs/frontier.md and its
pictures), from which --from_published goes on elsewhere. Everything runs one after the other on one thread. What is there is not done again, what was
interrupted goes on, and --minutes ends a call after the run that is under way, so parts of it fit in between other work.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from benchmarks.frontier.data import Sizes
from benchmarks.frontier.images import ROUTES
from benchmarks.frontier.methods import METHODS
from benchmarks.frontier.picture import draw
from benchmarks.frontier.results import Results
from benchmarks.frontier.running import Clock
from benchmarks.frontier.samples import draw_samples
from benchmarks.frontier.summary import summary
from benchmarks.frontier.table import page
from benchmarks.frontier.tasks import CALL, TASKS
from benchmarks.frontier.work import Plan, Work, of_recipes, of_today, read_frozen
from benchmarks.one_thread import ROOT

PUBLISHED, PAGE = ROOT / "benchmarks" / "frontier", ROOT / "docs" / "frontier.md"
KEPT = ("results.jsonl", "frozen.json")  # of an output folder: what was measured, and what the search has found
MARK = "<!-- What follows is written by `python -m benchmarks.frontier publish`. -->"


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m benchmarks.frontier", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("part", choices=("search", "run", "report", "samples", "publish"))
    found.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    found.add_argument("--models", nargs="+", choices=list(CALL), default=list(CALL))
    found.add_argument("--methods", nargs="+", choices=[*METHODS, *ROUTES], default=[*METHODS, *ROUTES], help="all if absent, controls among them")
    found.add_argument("--budgets", nargs="+", type=int, default=[2000, 8000, 32000], help="denoiser rows of a training, the smallest first")
    found.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the trainings; images are judged at the same seeds for all")
    found.add_argument("--guidance", nargs="+", type=float, default=[3.0, 1.0], help="that images are judged at; the search takes the first")
    found.add_argument("--judge", help="NAME or NAME@MODEL of the independent judge, such as scene_score@FOLDER; each task's own if absent")
    found.add_argument("--images", type=int, default=192, help="held-out images a model")
    found.add_argument("--search_images", type=int, default=48, help="images of training prompts that the search judges by")
    found.add_argument("--kl", type=int, default=16, help="trajectories of the path KL; 0 leaves it out")
    found.add_argument("--data_prompts", type=int, default=500, help="prompts of the model's own images; four pairs each")
    found.add_argument("--swaps", type=int, default=2400, help="pairs of swapped objects")
    found.add_argument("--minutes", type=float, help="begin nothing new after so long")
    found.add_argument("--from_published", action="store_true", help="a new folder begins with the repository's results, which are not measured again")
    found.add_argument("--output_dir", type=Path, default=Path("runs/frontier"))
    return found


def plan_of(args) -> Plan:
    sizes, clock = Sizes(args.data_prompts, args.swaps), Clock(args.minutes)
    lists = (tuple(getattr(args, name)) for name in ("tasks", "models", "methods"))
    return Plan(
        args.output_dir.resolve(), *lists, tuple(sorted(args.budgets)), tuple(args.seeds), tuple(args.guidance), args.judge, args.images, args.search_images,
        args.kl, sizes, clock,
    )  # fmt: skip


def publish(output_dir: Path) -> None:
    """Results, tables and pictures into the repository."""
    copy(output_dir, PUBLISHED)
    for picture in output_dir.glob("frontier_*_samples.png"):
        shutil.copyfile(picture, PAGE.parent / picture.name)
    draw(rows_of(PUBLISHED), PAGE.parent)
    PAGE.write_text(published(), encoding="utf-8")
    print(f"{', '.join(KEPT)} in {PUBLISHED}, {PAGE} and its pictures: run docs/generate.py, and commit them all.")


def rows_of(folder: Path) -> list[dict]:
    """What tables and pictures of a folder's results show."""
    return of_today(Results(folder / "results.jsonl").all(), read_frozen(folder / "frozen.json"))


def copy(source: Path, target: Path) -> None:
    """What is kept of a folder, where there is any."""
    target.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def with_samples(names: Iterable[str]) -> list[str]:
    """The pictures' names, each before that of its samples where there are some."""
    return [shown for name in sorted(names) for shown in (name, f"{name}_samples") if shown == name or (PAGE.parent / f"{shown}.png").is_file()]


def published() -> str:
    """docs/frontier.md: its own words up to the mark, then the pictures and tables of the committed results."""
    words, rows = PAGE.read_text(encoding="utf-8").partition(MARK)[0], rows_of(PUBLISHED)
    names = dict.fromkeys(f"frontier_{row['task']}_{row['model']}_g{row['guidance']:g}" for row in rows)
    pictures = "".join(f"![{name.replace('_', ' ')}]({name}.png)\n\n" for name in with_samples(names))
    short = summary(rows)
    told = (
        f"## In short\n\nGains over the base are given; a place is taken at two standard errors, of images and seeds together.\n\n{short}\n\n" if short else ""
    )
    return f"{words}{MARK}\n\n{told}{pictures}{page(rows)}{before_the_search()}"


def before_the_search() -> str:
    """The published rows with the recipes' own numbers, where a search has found others."""
    found = of_recipes(Results(PUBLISHED / "results.jsonl").all(), read_frozen(PUBLISHED / "frozen.json"))
    if not found:
        return ""
    told = "What the same methods gain with the learning rates and strengths of their recipes, as they were measured before the search."
    return f"\n\n## Before the search\n\n{told}\n\n{page(found, ', before the search')}"


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    torch.set_num_threads(1)
    for logging in (diffusers_logging, transformers_logging):
        logging.disable_progress_bar()
        logging.set_verbosity_error()  # a LoRA without weights for the text encoder is what all of these are
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a training is ended in order

    if args.part == "publish":
        return publish(args.output_dir)
    if args.part == "report":
        rows = rows_of(args.output_dir)
        (args.output_dir / "frontier.md").write_text(page(rows), encoding="utf-8")
        print("\n".join(map(str, [args.output_dir / "frontier.md", *draw(rows, args.output_dir)])))
        return None
    if args.from_published and not (args.output_dir / "results.jsonl").is_file():
        copy(PUBLISHED, args.output_dir)
    work = Work(plan_of(args), lambda text: print(text, flush=True))
    if args.part == "samples":
        found = draw_samples(work, args.output_dir)
        return print(
            "\n".join(map(str, found)) or f"{args.output_dir} has no weights of these tasks, models and methods: `run` trains them. Nothing was drawn."
        )
    try:
        getattr(work, args.part)()
    except KeyboardInterrupt:
        raise SystemExit("Interrupted: the same command goes on from here.") from None
    if work.plan.clock.over:
        print("The time is over: the same command goes on from here.")
    if work.failed:
        raise SystemExit(f"{len(work.failed)} failed; the same command tries them again:\n" + "\n".join(work.failed))
    return None


if __name__ == "__main__":
    main()
