"""Reward against KL, against compute and against the judge: a row of panels for each route, one curve a method, a band over its seeds."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from benchmarks.frontier.methods import CLOSED, CONTROL, GRADIENT, INFERENCE, OFFLINE, ONLINE
from benchmarks.frontier.table import UNTRAINED, Number, groups, over_seeds
from benchmarks.frontier.tasks import TASKS
from benchmarks.frontier.work import BASE

ROUTES = (ONLINE, GRADIENT, OFFLINE, CLOSED, INFERENCE)
MARKERS = "osD^vP*X<>hdp8"
OTHERS = {"color": "0.85", "marker": "o", "markersize": 4}  # methods of other routes, behind those of a row
Entry = list[dict]
Rows = dict[tuple[str, int], Entry]


def compute(entry: Entry) -> Number:
    """Denoiser rows until the judged images are there: the training's, and those of the sampling."""
    return over_seeds([{"all": row["rows"] + row["images"] * row["rows_an_image"]} for row in entry], "all")


def draw(rows: list[dict], folder: Path) -> list[Path]:
    """A picture for each task, model and guidance; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for (task, model, guidance, judge, _, _), found in sorted(groups(rows).items()):
        routes = [route for route in ROUTES if named(found, route)] or [CONTROL]
        figure = Figure(figsize=(16, 0.8 + 3.6 * len(routes)), layout="constrained")
        for axes, route in zip(figure.subplots(len(routes), 3, squeeze=False), routes):
            row_of_panels(axes, found, route, TASKS[task].measured, judge.partition("@")[0])
        title = f"{task}, {model}, guidance {guidance:g}: {TASKS[task].says}; gains over the base, bands of a standard error"
        figure.suptitle(title, fontsize=11)
        paths.append(folder / f"frontier_{task}_{model}_g{guidance:g}.png")
        figure.savefig(paths[-1], dpi=90)
    return paths


def named(rows: Rows, route: str) -> list[str]:
    """The methods of a route, in the order of their names."""
    return sorted({name for (name, _), entry in rows.items() if entry[0]["route"] == route and name != BASE})


def row_of_panels(axes, rows: Rows, route: str, reward: str, judge: str) -> None:
    """One route's methods in colours, controls in black, all others in grey behind them."""
    kl = lambda entry: over_seeds(entry, "kl")  # noqa: E731
    for axis, x, y in zip(axes, (kl, compute, lambda entry: over_seeds(entry, "reward_gain")), ("reward_gain", "reward_gain", "judge_gain")):
        panel(axis, rows, route, y, x)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.grid(alpha=0.3)
    axes[0].set(xlabel="exact path KL to the base, nats", ylabel=f"{route}\n{reward}: gain", xscale="symlog")
    axes[0].margins(x=0.15)
    axes[0].set_xlim(left=0)
    axes[1].set(xlabel="denoiser rows: training, and sampling of the judged images", ylabel=f"{reward}: gain", xscale="log")
    low, high = axes[1].get_xlim()
    ticks = LogLocator(subs=(1, 2, 5)) if high > 3 * low else MaxNLocator(4)  # which crowd at one end, or are too few
    axes[1].xaxis.set(major_locator=ticks, minor_locator=NullLocator(), major_formatter=StrMethodFormatter("{x:,.0f}"))
    axes[2].set(xlabel=f"{reward}: gain", ylabel=f"{judge} (took no part): gain")
    axes[2].xaxis.set_major_locator(MaxNLocator(5))  # gains of thousandths have long labels
    axes[2].legend(*axes[1].get_legend_handles_labels(), loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)


def styles(names: list[str], route: str) -> dict[str, dict]:
    """A colour and a marker each; controls are black. No colour comes twice up to twenty names."""
    colors = colormaps["tab10" if len(names) <= 10 else "tab20"].colors
    looks = {name: {"color": "black" if route == CONTROL else colors[i % len(colors)], "marker": MARKERS[i % len(MARKERS)]} for i, name in enumerate(names)}
    return {name: {**look, "markersize": 6} for name, look in looks.items()}


def panel(axis, rows: Rows, route: str, y: str, x: Callable[[Entry], Number]) -> None:
    """Each method's budgets from left to right. Bounds have no place along KL and compute: there they are dotted lines."""
    for other in (other for other in ROUTES if other != route):
        for name in named(rows, other):
            axis.plot(*points(rows, name, y, x)[:2], linestyle="none", zorder=1, **OTHERS)
    looks = styles(named(rows, CONTROL), CONTROL) | styles(named(rows, route), route)
    for name, look in looks.items():
        bound = name in UNTRAINED
        if bound and y == "reward_gain":
            height = over_seeds(next(entry for (other, _), entry in rows.items() if other == name), y).mean
            axis.axhline(height, color="black", linestyle=":" if name == UNTRAINED[0] else "-.", linewidth=1, label=name)
            continue
        across, means, errors = points(rows, name, y, x)
        if bound:  # in the legend it is the line of the other panels
            axis.annotate(name, (across[0], means[0]), textcoords="offset points", xytext=(-6, -12), ha="right", fontsize=7)
        axis.plot(across, means, linestyle="--" if look["color"] == "black" else "-", linewidth=1.2, label=name, **look)
        low, high = [m - e for m, e in zip(means, errors)], [m + e for m, e in zip(means, errors)]
        axis.fill_between(across, low, high, color=look["color"], alpha=0.15)
        if len(across) == 1:
            axis.errorbar(across, means, yerr=errors, fmt="none", ecolor=look["color"], elinewidth=0.8)


def points(rows: Rows, name: str, y: str, x: Callable[[Entry], Number]) -> tuple[list[float], list[float], list[float]]:
    """A method's budgets: where they are across, their means and their errors."""
    entries = [entry for (other, _), entry in rows.items() if other == name]
    found = sorted((x(entry).mean, over_seeds(entry, y).mean, over_seeds(entry, y).error) for entry in entries)
    found = [(a, b, 0.0 if math.isnan(error) else error) for a, b, error in found if not math.isnan(a) and not math.isnan(b)]
    across, means, errors = ([point[i] for point in found] for i in range(3))
    return across, means, errors
