"""Reward against KL and reward against compute: one curve a method, a band over its seeds."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure

from benchmarks.frontier.methods import CONTROL
from benchmarks.frontier.table import UNTRAINED, Number, groups, over_seeds
from benchmarks.frontier.tasks import TASKS
from benchmarks.frontier.work import BASE

MARKERS = "osD^vP*X<>"


def compute(entry: list[dict]) -> Number:
    """Denoiser rows until the judged images are there: the training's, and those of the sampling."""
    return over_seeds([{"all": row["rows"] + row["images"] * row["rows_an_image"]} for row in entry], "all")


def draw(rows: list[dict], folder: Path) -> list[Path]:
    """A picture for each task, model and guidance; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for (task, model, guidance, judge, _, _), found in sorted(groups(rows).items()):
        figure = Figure(figsize=(15, 5.5), layout="constrained")
        axes = figure.subplots(1, 3)
        style = styles(sorted({name for name, _ in found if name != BASE}))
        reward, judged = TASKS[task].measured, judge.partition("@")[0]
        axes[0].margins(x=0.15)
        panel(axes[0], found, style, "reward_gain", lambda entry: over_seeds(entry, "kl"))
        axes[0].set(xlabel="exact path KL to the base, nats", ylabel=f"{reward}: gain", xscale="symlog")
        axes[0].set_xlim(left=0)
        panel(axes[1], found, style, "reward_gain", compute)
        axes[1].set(xlabel="denoiser rows: training, and sampling of the judged images", ylabel=f"{reward}: gain", xscale="log")
        panel(axes[2], found, style, "judge_gain", lambda entry: over_seeds(entry, "reward_gain"))
        axes[2].set(xlabel=f"{reward}: gain", ylabel=f"{judged} (took no part): gain")
        for axis in axes:
            axis.axhline(0, color="black", linewidth=0.8)
            axis.grid(alpha=0.3)
        title = f"{task}, {model}, guidance {guidance:g}: {TASKS[task].says}; gains over the base, bands of a standard error over seeds (of images, with one)"
        figure.suptitle(title, fontsize=10)
        figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=8, fontsize=7)
        paths.append(folder / f"frontier_{task}_{model}_g{guidance:g}.png")
        figure.savefig(paths[-1], dpi=100)
    return paths


def styles(names: list[str]) -> dict[str, dict]:
    """A colour and a marker each; the same name has the same in all panels of a picture."""
    colors = colormaps["tab20"].colors
    return {name: {"color": colors[i % len(colors)], "marker": MARKERS[i % len(MARKERS)]} for i, name in enumerate(names)}


def panel(axis, rows: dict[tuple[str, int], list[dict]], style: dict[str, dict], y: str, x) -> None:
    """Each method's budgets from left to right; controls are dashed. Bounds have no place along KL and compute: there they are dotted lines."""
    for name, look in style.items():
        entries = [entry for (other, _), entry in sorted(rows.items(), key=lambda item: item[0][1]) if other == name]
        if name in UNTRAINED and y == "reward_gain":
            axis.axhline(over_seeds(entries[0], y).mean, color=look["color"], linestyle=":", label=name)
            continue
        points = sorted((x(entry).mean, *vars(over_seeds(entry, y)).values()) for entry in entries)
        points = [(a, b, 0.0 if math.isnan(error) else error) for a, b, error in points if not math.isnan(a) and not math.isnan(b)]
        if not points:
            continue
        across, means, errors = (list(column) for column in zip(*points))
        control = entries[0][0]["route"] == CONTROL
        axis.plot(across, means, linestyle="--" if control else "-", linewidth=1.2, markersize=5, label=name, **look)
        low, high = [m - e for m, e in zip(means, errors)], [m + e for m, e in zip(means, errors)]
        axis.fill_between(across, low, high, color=look["color"], alpha=0.15)
        if len(points) == 1 or name in UNTRAINED:
            axis.errorbar(across, means, yerr=errors, fmt="none", ecolor=look["color"], elinewidth=0.8)
