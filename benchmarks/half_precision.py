"""Does `--mixed_precision` learn what float32 learns? Flow-GRPO, DRaFT-3 and DiffusionNFT on the embedded mini-sd3, in each precision.

    python -m benchmarks.half_precision --seeds 0 1 2 --precisions no bf16 fp16 --minutes 30
    python -m benchmarks.half_precision report

The recipes, for the epochs of `METHODS` and the rewards of the frontier's tasks, at the same seeds in each precision. Weights in half precision, autocast and
the loss scaler are the flag's own. Every LoRA is judged in float32, on 96 pictures of held-out prompts (12 steps, guidance 1), paired with the base's and
with those of the float32 training at equal prompts and seeds. A CPU without AVX-512 takes six to eight times as long for a product in half precision (a
hundred times for a convolution): `Products` computes them from the same rounded factors, with sums in float32, and rounds the result, as tensor cores do. A
line of `results.jsonl` a training; what is there is not done again, and --minutes ends a call after the training that is under way.
"""

from __future__ import annotations

import argparse
import json
import math
import runpy
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from benchmarks.frontier.judging import Bench, Terms
from benchmarks.frontier.results import weights_of
from benchmarks.frontier.running import UNWATCHED, Clock, spent
from benchmarks.frontier.tasks import TASKS, write_lines
from benchmarks.one_thread import call
from diffusers_align.files.levels import digest_of, script_of
from diffusers_align.files.paths import find_recipe, front_door
from diffusers_align.training.report.statistics import mean_and_error

MODEL, IMAGES, FLOAT = "mini-sd3", 96, "no"
PRECISIONS = ("no", "bf16", "fp16")


@dataclass(frozen=True)
class Method:
    """A recipe, how many epochs of it, the task of the frontier whose reward it is judged by, and what is put over the recipe's settings."""

    recipe: str
    epochs: int
    task: str
    over: dict[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """What a training is run with, but for its seed and precision."""
        recipe = yaml.safe_load(find_recipe(self.recipe).read_text(encoding="utf-8"))
        kept = {name: value for name, value in recipe.items() if name not in ("early_stop_hacking", "output_dir")}  # it is to come to its end
        return {**kept, **self.over, **UNWATCHED, "num_epochs": self.epochs, "checkpointing_epochs": self.epochs}


BLUE = {"prompts": "likes_blue_train", "eval_prompts": "likes_blue_heldout", "reward": "background_color", "eval_reward": "scene_score", "kl_weight": 0.1}
METHODS = {
    "Flow-GRPO": Method("flow_grpo_mini_sd3", 6, "color", BLUE),
    "DiffusionNFT": Method("nft_mini_sd3", 5, "color"),
    "DRaFT-3": Method("draft_mini_sd3", 12, "clip"),
}


class Products(TorchDispatchMode):
    """Context: products of half precision are computed in float32 and rounded once."""

    slow = {
        getattr(torch.ops.aten, name).default
        for name in ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", "_scaled_dot_product_flash_attention_for_cpu_backward")
    }

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        factors = [x for x in args if isinstance(x, Tensor)]
        half = next((x.dtype for x in factors if x.dtype in (torch.bfloat16, torch.float16)), None)
        if half is None or function not in self.slow:
            return function(*args, **(kwargs or {}))
        args, kwargs = tree_map_only(Tensor, lambda x: x.float() if x.dtype == half else x, (args, kwargs or {}))
        return tree_map_only(Tensor, lambda x: x.to(half), function(*args, **kwargs))


def run_here(script: str, words: list[str]) -> None:
    """A training script in this process, with its products in float32."""
    sys.argv = [script, *words]
    with Products():
        runpy.run_path(str(front_door("training_scripts", script)), run_name="__main__")


def train(method: Method, precision: str, seed: int, folder: Path) -> dict:
    """One training in a process of its own, from its beginning: what it cost, and the logged numbers of its last epoch."""
    settings = {**method.settings, "output_dir": str(folder), "seed": seed, "mixed_precision": precision}
    shutil.rmtree(folder, ignore_errors=True)  # what was killed begins anew
    folder.mkdir(parents=True)
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.half_precision", "train", script_of(method.recipe), "--config", str(folder / "settings.yaml")]
    call(command, folder / "log.txt")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    cost = spent(folder)
    errors = [row["ratio_error"] for row in rows if "ratio_error" in row]
    return {"rows": cost.rows, "updates": cost.updates, "seconds": cost.processor_seconds, "ratio_error": max(errors, default=None)}


class Study:
    """The trainings below a folder, and a line for each."""

    def __init__(self, folder: Path):
        self.folder, self.file, self._benches = folder, folder / "results.jsonl", {}
        self.rows = [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.is_file() else []

    @property
    def comparable(self) -> list[dict]:
        """The rows of today's settings."""
        return [row for row in self.rows if row["settings"] == digest_of(METHODS[row["method"]].settings)[:8]]

    def bench(self, task: str) -> Bench:
        if task not in self._benches:
            terms = Terms(guidance=1.0, judge=TASKS[task].judge, images=IMAGES, kl=0)
            weights = weights_of(MODEL, [TASKS[task].reward, TASKS[task].judge])
            self._benches = {task: Bench(task, MODEL, TASKS[task].held_out, terms, self.folder / "bases", weights)}
        return self._benches[task]

    def add(self, name: str, precision: str, seed: int) -> None:
        """Train and judge, unless that has been done."""
        key = {"method": name, "precision": precision, "seed": seed, "settings": digest_of(METHODS[name].settings)[:8]}
        if any(key.items() <= row.items() for row in self.rows):
            return
        folder = self.folder / f"{METHODS[name].recipe}-{precision}-{seed}"
        cost = train(METHODS[name], precision, seed, folder)
        bench = self.bench(METHODS[name].task)
        scores = bench.of_lora(folder)
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)  # the weights are beside it
        found = {"reward": scores.reward.tolist(), "judge": scores.judge.tolist()}
        self.rows.append({**key, **cost, **found, "base_reward": bench.base.reward.tolist(), "base_judge": bench.base.judge.tolist()})
        write_lines(self.file, self.rows)
        gain, error = mean_and_error(scores.reward - bench.base.reward)
        print(f"{name}, {precision}, seed {seed}: {gain:+.4f} ± {error:.4f}, {cost['rows']} rows, {cost['seconds']:.0f} CPU s", flush=True)


def over_seeds(rows: list[dict], floats: list[dict], name: str) -> tuple[float, float, float, float]:
    """Mean gain over the base with its standard error, and the same of the difference to the float32 trainings of the same seeds. The error is the larger
    one of two: that over all pairs of pictures, and that over the seeds' means, which knows that a training by itself goes its own way."""
    gains = torch.stack([torch.tensor(row[name]) - torch.tensor(row[f"base_{name}"]) for row in rows])
    by_seed = {row["seed"]: torch.tensor(row[name]) for row in floats}
    apart = torch.stack([torch.tensor(row[name]) - by_seed[row["seed"]] for row in rows])
    return (*_estimate(gains), *_estimate(apart))


def _estimate(values: Tensor) -> tuple[float, float]:
    """Of (seeds, pictures)."""
    errors = [error for error in (mean_and_error(values.flatten())[1], mean_and_error(values.mean(1))[1]) if not math.isnan(error)]
    return float(values.mean()), max(errors)


def table(rows: list[dict]) -> list[str]:
    """A row for each method and precision, as Markdown."""
    lines = [
        "| method | precision | denoiser rows | reward: gain | gain, less float32's | judge: gain, less float32's | ratio_error |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in METHODS:
        floats = [row for row in rows if row["method"] == name and row["precision"] == FLOAT]
        seeds = {row["seed"] for row in floats}
        for precision in PRECISIONS:
            found = [row for row in rows if row["method"] == name and row["precision"] == precision and row["seed"] in seeds]
            if not found:
                continue
            (gain, error, apart, apart_error), (_, _, judged, judged_error) = (over_seeds(found, floats, kind) for kind in ("reward", "judge"))
            ratio = "" if found[0]["ratio_error"] is None else f"{max(row['ratio_error'] for row in found):g}"
            others = ["", ""] if precision == FLOAT else [f"{apart:+.4f} ± {apart_error:.4f}", f"{judged:+.4f} ± {judged_error:.4f}"]
            shown = {"no": "float32"}.get(precision, precision)
            lines.append(f"| {' | '.join([name, shown, format(found[0]['rows'], ','), f'{gain:+.4f} ± {error:.4f}', *others, ratio])} |")
    return lines


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m benchmarks.half_precision", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("part", nargs="?", choices=("run", "report"), default="run")
    found.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    found.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["no", "bf16"])
    found.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    found.add_argument("--minutes", type=float, help="begin nothing new after so long")
    found.add_argument("--output_dir", type=Path, default=Path("runs/half_precision"))
    return found


def main() -> None:
    args = parser().parse_args()
    torch.set_num_threads(1)
    study, clock = Study(args.output_dir), Clock(args.minutes)
    for seed in args.seeds if args.part == "run" else []:
        for name in args.methods:
            for precision in args.precisions:
                if not clock.over:
                    study.add(name, precision, seed)
    print("\n".join(table(study.comparable)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        run_here(sys.argv[2], sys.argv[3:])
    else:
        main()
