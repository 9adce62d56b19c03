"""The results as tables: means over seeds, and each method against the controls of its budget."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import mean, stdev

from benchmarks.frontier.methods import CONTROL, METHODS, numbers
from benchmarks.frontier.tasks import TASKS
from benchmarks.frontier.work import BASE

SURE = 2.0  # standard errors of a difference that count as one
UNTRAINED = ("real scenes", "best of 8")  # controls that are bounds and no trainings
COLUMNS = ("method", "seeds", "rows", "updates", "images seen", "CPU s", "{reward}: gain", "against the controls", "{judge}: gain", "gap, s.d.", "KL, nats")
HEAD = f"| {' | '.join((*COLUMNS, 'diversity', 'learning rate, strength'))} |"
ERRORS = "Errors are of the images, which all seeds share, and of a row's training seeds, added in squares; with one seed, of the images alone."


@dataclass(frozen=True)
class Number:
    """A mean and its standard error; NaN where there is none."""

    mean: float
    error: float

    def __sub__(self, other: Number) -> Number:
        return Number(self.mean - other.mean, math.hypot(self.error, other.error))


def over_seeds(rows: list[dict], name: str) -> Number:
    """Of a number of the results over the seeds. The error joins that of the images, which seeds do not lessen as they share them, and that of the mean
    over seeds; with one seed it is that of the images alone."""
    found = [value if isinstance(value := row[name], dict) else {"mean": value, "se": None} for row in rows]
    means = [value["mean"] for value in found if value["mean"] is not None]
    if not means:
        return Number(math.nan, math.nan)
    of_images = [value["se"] for value in found if value["mean"] is not None and value["se"] is not None]
    of_seeds = [stdev(means) / len(means) ** 0.5] if len(means) > 1 else []
    parts = [*([mean(of_images)] if of_images else []), *of_seeds]
    return Number(mean(means), math.hypot(*parts) if parts else math.nan)


def groups(rows: Iterable[dict]) -> dict[tuple, dict[tuple[str, int], list[dict]]]:
    """The rows of each table (task, model, guidance, judge), and in it of each method and budget."""
    found: dict[tuple, dict[tuple[str, int], list[dict]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        found[row["task"], row["model"], row["guidance"], row["judge"], row["images"], row["weights"]][row["method"], row["budget"]].append(row)
    # Of a method whose settings have changed the latest alone, so that no mean is over two of them.
    return {key: {name: [row for row in entry if row["settings"] == entry[-1]["settings"]] for name, entry in group.items()} for key, group in found.items()}


def against_controls(rows: dict[tuple[str, int], list[dict]], key: tuple[str, int]) -> Number:
    """The gain over the best training that learns nothing of the preference at this budget, the base (gain 0) among them."""
    best = max([over_seeds(entry, "reward_gain") for entry in trained_controls(rows).get(key[1], [])] + [Number(0.0, 0.0)], key=lambda number: number.mean)
    return over_seeds(rows[key], "reward_gain") - best


def trained_controls(rows: dict[tuple[str, int], list[dict]]) -> dict[int, list[list[dict]]]:
    """By budget, those of a table."""
    found: dict[int, list[list[dict]]] = defaultdict(list)
    for (name, budget), entry in rows.items():
        if budget and entry[0]["route"] == CONTROL and name not in UNTRAINED:
            found[budget].append(entry)
    return found


def is_controlled(rows: dict[tuple[str, int], list[dict]], budget: int) -> bool:
    """Whether a budget has what its gains can be compared with: a trained control, where the table has one at all."""
    return budget in (found := trained_controls(rows)) or not found


def verdict(difference: Number) -> str:
    """`wins`, `loses`, or `even` where it is not sure."""
    if not difference.error > 0:
        return "no error known"
    share = difference.mean / difference.error
    return "wins" if share >= SURE else "loses" if share <= -SURE else "even"


def shown(number: Number, form: str = "+.3f") -> str:
    if math.isnan(number.mean):
        return "–"
    return f"{number.mean:{form}}" + ("" if math.isnan(number.error) else f" ± {number.error:{form.lstrip('+')}}")


def line(rows: dict[tuple[str, int], list[dict]], key: tuple[str, int]) -> str:
    """A method at a budget."""
    name, budget = key
    entry = rows[key]
    cost = [f"{over_seeds(entry, field).mean:,.0f}" if budget else "" for field in ("rows", "updates", "distinct", "processor_seconds")]
    trained = budget and entry[0]["route"] != CONTROL
    against = against_controls(rows, key) if trained and is_controlled(rows, budget) else None
    cells = [name + ("" if entry[0]["tuned"] or not trained else "*"), str(len(entry)) if budget else "", *cost, shown(over_seeds(entry, "reward_gain"))]
    said = "" if against is None else verdict(against) if len(entry) > 1 else "one seed"
    cells += [
        f"{shown(against)}, {said}" if against else "no control of this budget" if trained else "",
        shown(over_seeds(entry, "judge_gain")),
        shown(over_seeds(entry, "gap"), "+.2f"),
    ]
    cells += [shown(over_seeds(entry, "kl"), ".0f"), shown(over_seeds(entry, "diversity"), ".3f"), numbers_of(entry[0]) if budget else ""]
    return "| " + " | ".join(cells) + " |"


def numbers_of(row: dict) -> str:
    """What the search tries, as the row's training had it: the learning rate, and the strength by the name of its flag."""
    found = numbers(METHODS[row["method"]], TASKS[row["task"]], row["model"], row["factors"])
    return ", ".join(f"{value:g}" if name == "learning_rate" else f"{name} {value:g}" for name, value in found.items())


def table(rows: dict[tuple[str, int], list[dict]], task: str, judge: str) -> str:
    """One Markdown table: what is not trained first, then methods by budget, the largest gain first."""
    order = sorted(rows, key=lambda key: (key[1], key[0] != BASE, -over_seeds(rows[key], "reward_gain").mean))
    head = HEAD.format(reward=TASKS[task].measured, judge=judge.partition("@")[0])
    return "\n".join([head, "|---" * head.count(" | ") + "|---|", *(line(rows, key) for key in order)])


def page(rows: list[dict], suffix: str = "") -> str:
    """All tables, with what is needed to read them.

    Args:
        suffix: of the headings.
    """
    if not rows:
        return "Nothing has been measured yet.\n"
    parts = []
    for (task, model, guidance, judge, images, weights), found in sorted(groups(rows).items()):
        base, judged = found[BASE, 0][0] if (BASE, 0) in found else None, TASKS[task].measured
        told = f"Base: {judged} {base['reward']['mean']:.3f}, {judge.partition('@')[0]} {base['judged']['mean']:.3f}. " if base else ""
        parts.append(
            f"## {task}, {model}, guidance {guidance:g}{suffix}\n\n{TASKS[task].says[0].upper()}{TASKS[task].says[1:]}. {told}{images} held-out images a model."
        )
        controls = sorted({name for (name, budget), entry in found.items() if budget and entry[0]["route"] == CONTROL})
        told = f"Trained controls: {'; '.join(controls)}." if controls else "No control was trained, so all is over the base alone."
        parts.append(f"{told} {ERRORS} Weights {weights}.\n\n{table(found, task, judge)}\n")
    if any(not row["tuned"] and row["budget"] and row["route"] != CONTROL for row in rows):
        parts.append("\\* with its recipe's own numbers: the search was not run for it.\n")
    return "\n\n".join(parts)
