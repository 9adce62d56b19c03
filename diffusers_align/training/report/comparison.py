"""What a comparison of models says, as data (for JSON) and as a Markdown table made of the same data.

`evaluate.py` alone has it: a script that trains compares two models, before and after, and `report` says that.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..online.sampling import Evaluation, paired_gain
from ..run.costs import Cost
from .statistics import mean_and_error, win_rate

Entry = dict[str, Any]
NOTHING = "–"
DIVERSITY = {"pixel_rms": "diversity, RMS of pixels, or of a sound's values", "clip": "diversity, 1 - cosine of CLIP features"}
COSTS = {
    "images": "training: images generated",
    "denoiser_evaluations": "training: denoiser rows",
    "denoiser_evaluations_with_gradients": "training: of these with gradients",
    "seconds": "training: wall time",
}


def describe(
    evaluation: Evaluation,
    base: Evaluation | None,
    diversities: dict[str, Tensor],
    kl: dict[str, Tensor],
    cost: Cost | None,
    margins: Tensor | None = None,
) -> Entry:
    """One model's numbers.

    Args:
        base: the base model's samples at the same prompts and seeds; None for the base itself.
        diversities: by measure, one number per prompt.
        kl: path KLs by unit, one number per trajectory.
        margins: implicit ones of held-out pairs, one number per pair.
    """
    entry: Entry = {"rewards": {name: _reward(values, base and base.rewards.get(name)) for name, values in evaluation.rewards.items()}}
    entry["diversity"] = {name: _estimate(values) for name, values in diversities.items()}
    entry["kl"] = {unit: _estimate(values) for unit, values in kl.items()}
    if margins is not None:
        accuracy = asdict(win_rate(margins, torch.zeros_like(margins)))
        entry["held_out_pairs"] = {"accuracy": accuracy, "margin": _estimate(margins), "values": margins.tolist()}
    if cost is not None:
        entry["costs"] = asdict(cost)
    return entry


def _estimate(values: Tensor) -> Entry:
    return dict(zip(("mean", "se"), mean_and_error(values)))


def _reward(values: Tensor, base: Tensor | None) -> Entry:
    against = {} if base is None else {"gain": dict(zip(("mean", "se"), paired_gain(base, values))), "win_rate": asdict(win_rate(values, base))}
    return {**_estimate(values), "left_out": int(values.isnan().sum()), **against, "values": values.tolist()}


def table(models: dict[str, Entry], rewards: list[str]) -> str:
    """Markdown: a column per model, a row per number. `rewards` are given with a win rate and in any case, their components where there is a score."""
    rows: list[tuple[str, list[str]]] = []

    def add(label: str, cell, *path: str, always: bool = False) -> None:
        found = [_at(entry, *path) for entry in models.values()]
        if always or any(value is not None and cell(value) != NOTHING for value in found):
            rows.append((label, ["" if value is None else cell(value) for value in found]))

    for name in sorted({name for entry in models.values() for name in entry["rewards"]}, key=lambda name: (_owner(name, rewards), name)):
        asked = name in rewards
        shown = as_text(name)
        add(f"**{shown}**" if asked else shown, _mean_or_none if asked else _mean_left_out, "rewards", name, always=asked)
        add(f"{shown}: gain", _signed, "rewards", name, "gain")
        if asked:
            add(f"{shown}: win rate", _wins, "rewards", name, "win_rate")
    for name, label in DIVERSITY.items():
        add(label, _plain, "diversity", name)
    add("implicit accuracy on held-out pairs", _wins, "held_out_pairs", "accuracy")
    add("implicit margin on held-out pairs", _signed, "held_out_pairs", "margin")
    add("KL to the base, nats per trajectory", _plain, "kl", "nats")
    add("KL to the base, nats a dimension", _plain, "kl", "nats_per_dimension")
    for name, label in COSTS.items():
        add(label, _duration if name == "seconds" else "{:,}".format, "costs", name)
    lines = [f"| | {' | '.join(map(as_text, models))} |", f"|---|{'---|' * len(models)}", *(f"| {label} | {' | '.join(cells)} |" for label, cells in rows)]
    return "\n".join(lines) + "\n"


def as_text(name: str) -> str:
    """A name in a Markdown table as it is: the `*` of a sum would be emphasis, a `|` would end the cell."""
    return re.sub(r"([\\`*|<])", r"\\\1", name)


def _at(entry: Entry, *path: str) -> Any:
    value: Any = entry
    for key in path:
        value = None if value is None else value.get(key)
    return value


def _owner(name: str, rewards: list[str]) -> int:
    """Which reward a name belongs to: its own or that of `<reward>/<component>`."""
    return next(i for i, reward in enumerate(rewards) if name == reward or name.startswith(f"{reward}/"))


def _plain(value: Entry) -> str:
    return NOTHING if math.isnan(value["mean"]) else f"{value['mean']:.4g}" + ("" if math.isnan(value["se"]) else f" ± {value['se']:.2g}")


def _mean_left_out(value: Entry) -> str:
    left_out = 0 if math.isnan(value["mean"]) else value["left_out"]
    return _plain(value) + (f" ({left_out} without)" if left_out else "")


def _mean_or_none(value: Entry) -> str:
    return f"no score ({value['left_out']} of {len(value['values'])} images without)" if math.isnan(value["mean"]) else _mean_left_out(value)


def _signed(value: Entry) -> str:
    return ("+" if value["mean"] >= 0 else "") + _plain(value)


def _wins(value: Entry) -> str:
    if math.isnan(value["rate"]):
        return NOTHING
    left_out = f", {value['left_out']} pairs left out" if value["left_out"] else ""
    return f"{value['rate']:.1%} [{value['low']:.1%}, {value['high']:.1%}], {value['ties']} ties{left_out}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def without_nan(value: Any) -> Any:
    """The same data with None for NaN, which JSON does not have; tensors as lists."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, torch.Tensor)):
        return [without_nan(item) for item in (value.tolist() if isinstance(value, torch.Tensor) else value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value
