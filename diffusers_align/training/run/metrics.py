"""The numbers of an epoch: merged over processes, and written to `metrics.jsonl` and the curve."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

from accelerate.utils import gather_object

from ...rewards import InvalidReward
from ..report.pictures import reward_curve


def epoch_metrics(run, samples, diagnostics: list[list[dict]], norms: list[float], others: dict[str, list[float]]) -> dict[str, float]:
    """Reward metrics of `samples` (None: there are none); `ratio_error` before the first update, clipping after the last, if there are
    ratios; means of `others`, each over the processes that logged the name. `grad_norm` and `lr`
    are means over the epoch's optimizer steps, `lr` of the rates that they used.

    Args:
        diagnostics: of each optimizer step, those of its losses.

    Raises:
        InvalidReward: there are rewards among `others`, and not one is a number.
    """
    metrics = samples.metrics() if samples is not None else {}
    own = {name: list(values) for name, values in others.items()}
    if diagnostics:
        first, last = diagnostics[0], diagnostics[-1]
        means = {name: [sum(d[name] for d in last) / len(last)] for name in ("clip_fraction", "approx_kl")}
        own = {"ratio_error": [_worst([d["ratio_error"] for d in first])], **means, **own}
    gathered = gather_object([own])
    for name in dict.fromkeys(name for part in gathered for name in part):
        if values := [value for part in gathered for value in part.get(name, ())]:
            metrics[name] = _worst(values) if name == "ratio_error" else sum(values) / len(values)
    if "reward" not in metrics and any("reward" in part for part in gathered):
        raise InvalidReward(f"Not one sample of epoch {run.epoch} has a reward, so there is nothing to learn from: repair the reward or the prompts.")
    # A loss scaler's first steps overflow, by design.
    finite, rates = [norm for norm in norms if math.isfinite(norm)] or [0.0], run.rates or run.lr_scheduler.get_last_lr()[:1]
    return {**metrics, "grad_norm": sum(finite) / len(finite), "lr": sum(rates) / len(rates)}


def _worst(errors: list[float]) -> float:
    """The largest; NaN if there is one."""
    return max(errors, key=lambda error: (math.isnan(error), error))


# Seconds of a run between two drawings of its curve: one takes a tenth of a second, more with a longer history, and epochs of small models little more.
CURVE_EVERY = 30.0


def write_history(run) -> None:
    """The whole history to `metrics.jsonl`; its curve, where the last one is older than `CURVE_EVERY`."""
    write_atomically(run.output_dir / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in run.history))
    if run.curve_drawn is None or time.monotonic() - run.curve_drawn > CURVE_EVERY:
        draw_curve(run)


def draw_curve(run) -> None:
    """`reward_curve.png` of the whole history, by the main process; one that is up to date stays. A picture that cannot be drawn ends no run."""
    if not run.is_main or not run.history:
        return
    run.curve_drawn = time.monotonic()
    if run.rows_drawn == len(run.history):
        return
    try:
        reward_curve(run.history, run.output_dir / "reward_curve.png")
        run.rows_drawn = len(run.history)
    except Exception as error:
        run.explain_once(f"reward_curve.png could not be drawn ({type(error).__name__}: {error}); metrics.jsonl has the numbers.")


def write_atomically(path: Path, text: str) -> None:
    """The file as it was, or whole."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)
