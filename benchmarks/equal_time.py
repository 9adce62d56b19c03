"""Training scripts for the same processor time, and one table of `evaluate.py` for all of them: what comparisons of algorithms share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "training_scripts"
# base model, script, recipe, more flags
Recipe = tuple[str, str, str, list[str]]


def checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def processor_seconds(process: subprocess.Popen) -> float:
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def train(recipe: Recipe, folder: Path, minutes: float) -> None:
    """Run a recipe on one thread until its epochs have had their time, one of them at least; evaluation before training does not count,
    and wall time would count what else the machine does. What is there already is not run again.

    Raises:
        RuntimeError: it ended early.
    """
    if (folder / "processor_seconds").is_file():
        return
    _, script, name, flags = recipe
    command = [sys.executable, SCRIPTS / f"{script}.py", "--config", SCRIPTS / "recipes" / f"{name}.yaml", "--output_dir", folder, *flags]
    command += ["--num_epochs", "1000", "--checkpointing_epochs", "1", "--checkpoints_total_limit", "2", "--validation_epochs", "1000"]
    command += ["--num_eval_samples", "48", "--num_validation_images", "8"]
    folder.mkdir(parents=True, exist_ok=True)
    spent, start = 0.0, None
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"})
        while (spent < 60 * minutes or not checkpoints(folder)) and process.poll() is None:
            time.sleep(0.5)
            if start is None and "before:" in (folder / "log.txt").read_text():
                start = processor_seconds(process)
            spent = processor_seconds(process) - start if start is not None else 0.0
        process.send_signal(signal.SIGINT)
        process.wait()
    if spent < 60 * minutes:
        raise RuntimeError(f"{folder.name} ended early; its output is in {folder / 'log.txt'}.")
    (folder / "processor_seconds").write_text(f"{spent:.0f}")


def evaluate(base: str, folders: dict[str, Path], output_dir: Path, flags: list[str]) -> None:
    """`evaluate.py` on the last checkpoint of each of `folders`, by name."""
    loras = [checkpoints(folder)[-1] for folder in folders.values()]
    command = [sys.executable, SCRIPTS / "evaluate.py", "--pretrained_model_name_or_path", base, "--lora", *loras, "--lora_names", *folders]
    command += ["--num_inference_steps", "12", "--diversity_model", "mini-clip", "--batch_size", "48", "--output_dir", output_dir, *flags]
    subprocess.run(list(map(str, command)), check=True)


def curves(folders: dict[str, Path], metric: str, path: Path, label: str) -> None:
    """A line a run: the metric of each epoch against processor time, of which every epoch of a run has the same share."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for name, folder in folders.items():
        values = [json.loads(line)[metric] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        seconds = float((folder / "processor_seconds").read_text())
        axis.plot([seconds * (epoch + 0.5) / len(values) for epoch in range(len(values))], values, marker=".", label=name)
    axis.set_xlabel("processor seconds of training")
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
