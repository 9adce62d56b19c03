"""One recipe from its data to its last epoch, on one thread, in a folder of its own; what was interrupted goes on."""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.one_thread import call, named
from diffusers_align.files.levels import made_by, script_of
from diffusers_align.files.paths import find_recipe, folder, front_door

LAUNCH = ("accelerate", "launch")


def source_digest() -> str:
    """Of the package's and the scripts' code: a run of other code is not gone on with."""
    files = [*Path(__file__).parents[2].glob("diffusers_align/**/*.py"), *folder("training_scripts").glob("*.py")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()


def data_commands(recipe: str) -> list[list[str]]:
    """What makes the recipe's data, for this interpreter in the place of `accelerate launch` and `python`."""
    commands = []
    for lines in made_by(recipe):
        words = shlex.split(" ".join(lines))
        if tuple(words[:2]) == LAUNCH:
            words = [sys.executable, str(front_door("training_scripts", Path(words[2]).stem)), *words[3:]]
        elif words[0] == "python":
            words[0] = sys.executable
        commands.append(words)
    return commands


def run(recipe: str, place: Path, say: Callable[[str], None], flags: tuple[str, ...] = ()) -> list[dict]:
    """The rows of `metrics.jsonl` of the whole run.

    Args:
        place: where the recipe's relative paths begin: its data and its `output_dir` are made there.
        say: is told about progress.
        flags: for the script, after the recipe's own.

    Raises:
        benchmarks.one_thread.Failed: a command did.
    """
    place.mkdir(parents=True, exist_ok=True)
    for command in data_commands(recipe):
        done = place / "made" / hashlib.sha256(shlex.join(command[1:]).encode()).hexdigest()[:16]
        if not done.is_file():
            say(f"{recipe}: its data, by {named(command)}")
            call(command, place / "logs" / f"{recipe}.data.log", place)
            done.parent.mkdir(exist_ok=True)
            done.touch()
    out = place / recipe
    command = [sys.executable, str(front_door("training_scripts", script_of(recipe))), "--config", str(find_recipe(recipe)), "--output_dir", str(out)]
    command += ["--checkpointing_epochs", "1", *flags]
    if any(out.glob("checkpoint-*")):
        command += ["--resume_from_checkpoint", "latest"]
    call(command, place / "logs" / f"{recipe}.log", place, lambda seconds: say(f"{recipe}: {_epochs(out)} epochs after {seconds:.0f} s"))
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def _epochs(out: Path) -> int:
    path = out / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0
