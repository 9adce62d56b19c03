"""Goes through tasks, models, methods, budgets and seeds: trains what is not trained, judges what is not judged, writes a line each."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.frontier import images as without_training
from benchmarks.frontier.data import Data, Sizes, write_lines
from benchmarks.frontier.judging import Bench, Judged, Terms
from benchmarks.frontier.methods import CLOSED, METHODS, TUNED_AS, grid, settings
from benchmarks.frontier.results import Results, weights_of
from benchmarks.frontier.running import Clock, Spent, train
from benchmarks.frontier.tasks import TASKS
from benchmarks.one_thread import Failed
from diffusers_align.files.levels import digest_of

SEARCH_SEED = 1000
BASE = "base"


@dataclass(frozen=True)
class Plan:
    """What is asked for; the flags of the command line."""

    folder: Path
    tasks: tuple[str, ...]
    models: tuple[str, ...]
    methods: tuple[str, ...]
    budgets: tuple[int, ...]
    seeds: tuple[int, ...]
    guidance: tuple[float, ...]
    judge: str | None
    images: int
    search_images: int
    kl: int
    sizes: Sizes
    clock: Clock


@dataclass(frozen=True)
class Run:
    """One training."""

    task: str
    model: str
    method: str
    budget: int
    seed: int
    factors: dict[str, float]


class Work:
    """Everything below one folder; a second call goes on where the first was ended.

    Attributes:
        failed: what could not be run, in words.
    """

    def __init__(self, plan: Plan, say):
        self.plan, self.say, self.failed = plan, say, []
        self.results, self.searched = Results(plan.folder / "results.jsonl"), Results(plan.folder / "search.jsonl")
        self.frozen_file = plan.folder / "frozen.json"
        self._bench: tuple[tuple, Bench] | None = None

    # what there is

    def frozen(self) -> dict[str, dict[str, float]]:
        return read_frozen(self.frozen_file)

    def judge_of(self, task: str) -> str:
        return self.plan.judge or TASKS[task].judge

    def weights(self, task: str, model: str) -> str:
        return weights_of(model, [TASKS[task].reward, self.judge_of(task)])

    def data(self, task: str, model: str) -> Data:
        return Data(self.plan.folder, task, model, self.plan.sizes, self.say)

    def bench(self, task: str, model: str, guidance: float, held_out: bool = True) -> Bench:
        """One at a time is kept: each holds a pipeline."""
        key = (task, model, guidance, held_out)
        if self._bench is None or self._bench[0] != key:
            terms = Terms(guidance, self.judge_of(task), self.plan.images if held_out else self.plan.search_images, self.plan.kl if held_out else 0)
            prompts = self.data(task, model).prompts(held_out)
            self._bench = key, Bench(task, model, prompts, terms, self.plan.folder / "bases", self.weights(task, model))
        return self._bench[1]

    def pairs_of(self) -> Iterator[tuple[str, str]]:
        """Tasks with models."""
        return ((task, model) for task in self.plan.tasks for model in self.plan.models)

    def applying(self, task: str, model: str) -> list[str]:
        """The methods asked for that have a row there."""
        return [name for name in self.plan.methods if name in METHODS and METHODS[name].applies(TASKS[task], model)]

    # training

    def settings(self, run: Run) -> dict[str, Any]:
        method, task, data = METHODS[run.method], TASKS[run.task], self.data(run.task, run.model)
        found = settings(method, task, run.model, data.prompts(False), run.factors)
        if method.data:
            found["dataset_name"] = str(data.dataset(method.data, method.wrong, method.apart))
            if method.route != CLOSED:
                found["cache_dir"] = str(data.folder / "latents" / run.model)
        return {**found, "seed": run.seed}

    def folder_of(self, run: Run) -> Path:
        """Where its weights are, or would be."""
        digest = digest_of([self.settings(run), run.budget, self.weights(run.task, run.model)])[:8]
        place = self.plan.folder / "runs" / run.task / run.model / re.sub(r"\W+", "_", run.method.lower()).strip("_")
        return place / f"{run.budget}-{run.seed}-{digest}"

    def run_of(self, task: str, model: str, name: str, budget: int, seed: int) -> Run:
        """A training with what the search has found for it."""
        return Run(task, model, name, budget, seed, found_for(task, model, name, self.frozen()) or {})

    def train(self, run: Run) -> tuple[Path, Spent, int]:
        """The folder of the weights, what they cost, and how many different images they have seen."""
        method, found, folder = METHODS[run.method], self.settings(run), self.folder_of(run)
        cost = train(method.script, found, run.budget, folder, folder.parent / "probes")
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)  # the weights are beside it
        seen = min(self.data(run.task, run.model).distinct(Path(found["dataset_name"])), cost.rows) if method.data else cost.images
        return folder, cost, seen

    def judged(self, run: Run, folder: Path, bench: Bench) -> Judged:
        return without_training.of_flow(folder, bench) if METHODS[run.method].route == CLOSED else bench.of_lora(folder)

    def attempt(self, what: str, do) -> Any:
        """The result, or None where a script failed, which is told and does not keep the others from running."""
        try:
            return do()
        except Failed as error:
            self.failed.append(what)
            self.say(f"{what} FAILED: {error}")
            return None

    # parts of the command

    def search(self) -> None:
        """Try the grid of each method at the smallest budget, judged on training prompts by the reward alone, and freeze the best of it."""
        for task, model in self.pairs_of():
            for name in (name for name in self.applying(task, model) if name not in TUNED_AS):
                tried = []
                for factors in grid(METHODS[name]):
                    if self.plan.clock.over:
                        return
                    row = self.attempt(f"search: {task}, {model}, {name}, {factors}", lambda f=factors, n=name, t=task, m=model: self._try(t, m, n, f))
                    tried += [row] if row is not None and row["reward"]["mean"] is not None else []
                if tried:
                    best = max(tried, key=lambda row: row["reward"]["mean"])
                    self.say(f"{task}, {model}, {name}: frozen at {best['factors']}, reward {best['reward']['mean']:.4f} on training prompts")
                    write_lines(self.frozen_file, [json.dumps({**self.frozen(), f"{task}/{model}/{name}": best["factors"]}, indent=1)])

    def _try(self, task: str, model: str, name: str, factors: dict[str, float]) -> dict:
        run, guidance = Run(task, model, name, min(self.plan.budgets), SEARCH_SEED, factors), self.plan.guidance[0]
        label = ", ".join([name, *(f"{key} x {value:g}" for key, value in factors.items())])
        row = self._named(run, guidance, self.plan.search_images) | {"method": label, "factors": factors}
        if row not in self.searched:
            folder, cost, seen = self.train(run)
            bench = self.bench(task, model, guidance, held_out=False)
            self.searched.add({**row, **as_fields(cost), "distinct": seen, **self.judged(run, folder, bench).row(bench.base)})
        return self.searched.rows[Results.key(row)]

    def _named(self, run: Run, guidance: float, images: int) -> dict:
        identity = {"task": run.task, "model": run.model, "method": run.method, "budget": run.budget, "seed": run.seed, "guidance": guidance}
        identity |= {"judge": self.judge_of(run.task), "images": images, "weights": self.weights(run.task, run.model)}
        return {**identity, "settings": settings_digest(run)}

    def run(self) -> None:
        """All rows that are asked for and not there: those without training, then every training, judged at each guidance."""
        for task, model in self.pairs_of():
            self._without_training(task, model)
            for budget in self.plan.budgets:
                for seed in self.plan.seeds:
                    for name in self.applying(task, model):
                        if self.plan.clock.over:
                            return
                        run = self.run_of(task, model, name, budget, seed)
                        self.attempt(f"{task}, {model}, {name}, {budget} rows, seed {seed}", lambda run=run: self._row(run))

    def _row(self, run: Run) -> None:
        missing = [row for guidance in self.plan.guidance if (row := self._named(run, guidance, self.plan.images)) not in self.results]
        if not missing:
            return
        folder, cost, seen = self.train(run)
        # Controls are not searched: they have what was found for their method, as far as it takes that.
        tuned = found_for(run.task, run.model, run.method, self.frozen()) is not None
        fields = {"route": METHODS[run.method].route, "tuned": tuned, "factors": run.factors, **as_fields(cost), "distinct": seen}
        for row in missing:
            bench = self.bench(run.task, run.model, row["guidance"])
            self._add({**row, **fields, **self.judged(run, folder, bench).row(bench.base)})

    def _without_training(self, task: str, model: str) -> None:
        for guidance in self.plan.guidance:
            for name in (BASE, *(name for name in without_training.ROUTES if name in self.plan.methods)):
                row = self._named(Run(task, model, name, 0, 0, {}), guidance, self.plan.images)
                if row in self.results or self.plan.clock.over:
                    continue
                bench = self.bench(task, model, guidance)
                found = bench.base if name == BASE else without_training.judged(name, bench)
                fields = {"route": without_training.ROUTES.get(name, BASE), "tuned": False, "factors": {}, **as_fields(Spent(0, 0, 0, 0, 0.0)), "distinct": 0}
                self._add({**row, **fields, **found.row(bench.base)})

    def _add(self, row: dict) -> None:
        self.results.add(row)
        gains = [f"{name} {row[f'{name}_gain']['mean']:+.4f} ± {row[f'{name}_gain']['se']:.4f}" for name in ("reward", "judge")]
        where = f"{row['task']}, {row['model']}, guidance {row['guidance']:g}"
        self.say(f"{where}: {row['method']}, {row['budget']} rows, seed {row['seed']}: {', '.join(gains)}, {row['processor_seconds']:.0f} CPU s")


def settings_digest(run: Run) -> str:
    """Of a method's numbers on a task, wherever its data lie; empty where nothing is trained."""
    if run.method not in METHODS:
        return ""
    task = TASKS[run.task]
    return digest_of(settings(METHODS[run.method], task, run.model, task.train, run.factors))[:8]


def read_frozen(file: Path) -> dict[str, dict[str, float]]:
    """What a search has found, by task/model/method; nothing where there was none."""
    return json.loads(file.read_text()) if file.is_file() else {}


def found_for(task: str, model: str, name: str, frozen: dict[str, dict[str, float]]) -> dict[str, float] | None:
    """The factors that the search has frozen for a method, or for the one that it is trained as; None where there was no search."""
    return frozen.get(f"{task}/{model}/{TUNED_AS.get(name, name)}")


def of_today(rows: list[dict], frozen: dict[str, dict[str, float]]) -> list[dict]:
    """The rows of what a method's recipe says now and the search has found for it: others are of trainings that nobody would get any more.

    A row that has the recipe's own numbers is of the search where that has chosen these.
    """
    now = []
    for row in rows:
        task, model, name, budget, seed = (row[part] for part in ("task", "model", "method", "budget", "seed"))
        factors = found_for(task, model, name, frozen)
        if row["settings"] == settings_digest(Run(task, model, name, budget, seed, factors or {})):
            now.append({**row, "tuned": factors is not None, "factors": factors or {}})
    return now


def of_recipes(rows: list[dict], frozen: dict[str, dict[str, float]]) -> list[dict]:
    """The rows with their recipes' own numbers of methods that a search has found others for, and what was not trained beside them."""

    def own(row: dict) -> str:
        return settings_digest(Run(row["task"], row["model"], row["method"], row["budget"], row["seed"], {}))

    today = {(row["task"], row["model"], row["method"], row["settings"]) for row in of_today(rows, frozen)}
    found = [
        {**row, "tuned": True, "factors": {}}
        for row in rows
        if row["budget"] and row["settings"] == own(row) and (row["task"], row["model"], row["method"], row["settings"]) not in today
    ]
    places = {(row["task"], row["model"], row["guidance"], row["judge"], row["images"], row["weights"]) for row in found}
    return [*(r for r in rows if not r["budget"] and (r["task"], r["model"], r["guidance"], r["judge"], r["images"], r["weights"]) in places), *found]


def as_fields(cost: Spent) -> dict[str, Any]:
    """What was spent, under the names of the results."""
    return {
        "rows": cost.rows,
        "rows_with_gradient": cost.rows_with_gradient,
        "updates": cost.updates,
        "drawn": cost.images,
        "processor_seconds": cost.processor_seconds,
    }
