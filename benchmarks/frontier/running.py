"""One training to its budget: a script in a process of its own on one thread; what was interrupted goes on."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.one_thread import call
from diffusers_align.files.paths import front_door
from diffusers_align.training.checkpoints.state_files import read_state
from diffusers_align.training.run.costs import Cost

# A run is judged afterwards, by the frontier itself: its own evaluation is as small as it gets.
UNWATCHED = {"num_eval_samples": 2, "num_validation_images": 2, "validation_epochs": 10**6, "checkpoints_total_limit": 1, "allow_no_signal": True}
SAVES = 8  # checkpoints of a run, at most
LOOK = {"num_eval_samples": 48}  # a validation of a run that may end early; as many validations as checkpoints


def run_script(script: str, settings: dict[str, Any], folder: Path, resume: bool = False) -> None:
    """Run a script with these settings as its recipe, `folder/settings.yaml`, and its output in `folder/log.txt`.

    Raises:
        benchmarks.one_thread.Failed: it did.
    """
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    command = [sys.executable, str(front_door("training_scripts", script)), "--config", str(folder / "settings.yaml")]
    call([*command, "--resume_from_checkpoint", "latest"] if resume else command, folder / "log.txt")


@dataclass(frozen=True)
class Spent:
    """What a run has spent: denoiser rows, those of them with a graph, optimizer steps, images drawn, and seconds of the processor."""

    rows: int
    rows_with_gradient: int
    updates: int
    images: int
    processor_seconds: float


def spent(folder: Path) -> Spent:
    """Of a finished run."""
    cost = Cost.read(folder)
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    updates = read_state(last, "run")["optimizer_steps"]
    return Spent(cost.denoiser_evaluations, cost.denoiser_evaluations_with_gradients, updates, cost.images, cost.processor_seconds)


def train(script: str, settings: dict[str, Any], budget: int, folder: Path, probes: Path) -> Spent:
    """Train for as many epochs as come nearest to the budget of denoiser rows, one of them at least. A finished run is not run again.

    Args:
        probes: the method's folder for runs of one epoch and of two, which say how many rows an epoch takes.

    Raises:
        benchmarks.one_thread.Failed: the script did.
    """
    if not (folder / "spent.json").is_file():
        epochs = epochs_of(budget, script, settings, probes)
        folder.mkdir(parents=True, exist_ok=True)
        resume = any(folder.glob("checkpoint-*"))
        every = max(1, epochs // SAVES)
        watched = {**LOOK, "validation_epochs": every} if "early_stop_hacking" in settings else {}
        whole = {**settings, **UNWATCHED, **watched, "num_epochs": epochs, "checkpointing_epochs": every, "output_dir": str(folder)}
        run_script(script, whole, folder, resume)
        (folder / "spent.json").write_text(json.dumps(asdict(spent(folder))))
    return Spent(**json.loads((folder / "spent.json").read_text()))


def epochs_of(budget: int, script: str, settings: dict[str, Any], probes: Path) -> int:
    """As many as come nearest to a budget of denoiser rows, what comes once before them (a calibration) included."""
    one, two = (rows_of_epochs(number, script, settings, probes) for number in (1, 2))
    each = max(1, two - one)
    return max(1, round((budget - max(0, one - each)) / each))


def rows_of_epochs(number: int, script: str, settings: dict[str, Any], probes: Path) -> int:
    """By running them, once for the settings of a method that differ in nothing but the seed and numbers such as rates and weights."""
    kept = {name: value for name, value in settings.items() if name != "seed" and not isinstance(value, float)}
    folder = probes / hashlib.sha256(json.dumps([script, number, kept], sort_keys=True).encode()).hexdigest()[:16]
    if not (folder / "spent.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        run_script(script, {**settings, **UNWATCHED, "num_epochs": number, "checkpointing_epochs": number, "output_dir": str(folder)}, folder)
        (folder / "spent.json").write_text(json.dumps(asdict(spent(folder))))
    return json.loads((folder / "spent.json").read_text())["rows"]


class Clock:
    """How long this call may go on: `--minutes`, or for ever."""

    def __init__(self, minutes: float | None):
        self.end = None if minutes is None else time.monotonic() + 60 * minutes

    @property
    def over(self) -> bool:
        return self.end is not None and time.monotonic() > self.end
