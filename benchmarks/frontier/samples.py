"""What each method makes of the same prompts and seeds: a row of pictures each, by the weights that lie in the output folder."""

from __future__ import annotations

import textwrap
from itertools import product
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.frontier.methods import CLOSED, METHODS
from benchmarks.frontier.work import BASE, Run, Work

ACROSS = 8
WEIGHTS = "pytorch_lora_weights.safetensors"


def trained(work: Work, task: str, model: str, name: str) -> Run | None:
    """The method's training of the largest budget and then the first seed that has weights there."""
    runs = (work.run_of(task, model, name, budget, seed) for budget, seed in product(sorted(work.plan.budgets, reverse=True), work.plan.seeds))
    return next((run for run in runs if (work.folder_of(run) / WEIGHTS).is_file()), None)


def draw_samples(work: Work, folder: Path) -> list[Path]:
    """A picture for each task, model and guidance that has weights; returns the files."""
    paths = []
    for (task, model), guidance in product(work.pairs_of(), work.plan.guidance):
        runs = [run for name in work.applying(task, model) if METHODS[name].route != CLOSED and (run := trained(work, task, model, name))]
        if not runs:
            continue
        bench = work.bench(task, model, guidance)
        prompts = list({prompt.text: prompt for prompt in bench.prompts}.values())[:ACROSS]
        rows = {BASE: bench.drawn(None, prompts)} | {f"{run.method}, {run.budget:,}": bench.drawn(work.folder_of(run), prompts) for run in runs}
        paths.append(folder / f"frontier_{task}_{model}_g{guidance:g}_samples.png")
        sheet(rows, [prompt.text for prompt in prompts]).savefig(paths[-1], dpi=80)
    return paths


def sheet(rows: dict[str, list[Tensor]], prompts: list[str]) -> Figure:
    """Images (3, H, W) in rows with a title each, below their prompts."""
    figure = Figure(figsize=(2.2 + 1.1 * len(prompts), 0.6 + 1.1 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), len(prompts), squeeze=False)
    for axes, (title, images) in zip(panels, rows.items()):
        axes[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9)
        for axis, image in zip(axes, images):
            axis.imshow(image.float().clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
    for axis, prompt in zip(panels[0], prompts):
        axis.set_title(textwrap.fill(prompt, 16), fontsize=7)
    return figure
