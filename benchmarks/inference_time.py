"""Reward against compute without training: guidance, noise optimisation, best-of-n, particle steering and SVDD on the embedded models.

    python benchmarks/inference_time.py --models mini-sd3 mini-sd

Every method follows one reward, mini-clip's cosine (`clip_score`), on held-out prompts with equal seeds. `scene_score`, a classifier that no method
sees, tells better images from hacked ones. Costs are counted at the modules, for each image that is returned: rows of a batch through the denoiser
(two a step with classifier-free guidance), rows that a gradient came back through, and rows decoded to be judged.
"""

from __future__ import annotations

import argparse
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor, nn

from diffusers_align import embedded
from diffusers_align.data import load_prompts
from diffusers_align.driving.denoisers import denoisers
from diffusers_align.pipelines.best_of_n import BestOfNPipeline
from diffusers_align.pipelines.noise_optimization import NoiseOptimizationPipeline
from diffusers_align.pipelines.particle_steering import ParticleSteeringPipeline
from diffusers_align.pipelines.reward_guided import RewardGuidedPipeline
from diffusers_align.rewards import load_reward
from diffusers_align.training.report.pictures import comparison

CALL = {"mini-sd3": {"max_sequence_length": 1}, "mini-sd": {}}
STRENGTHS = {"dps": (10, 40), "mpgd": (0.2, 0.8), "freedom": (0.2, 2), "tfg": (4, 16), "flowchef": (4, 16), "universal": (2, 8)}
LAMBDA = 50.0  # of the tilt that particles follow
FAMILIES = {"best-of-n": "tab:blue", "guidance": "tab:orange", "noise": "tab:red", "steering": "tab:green"}
Method = tuple[str, type, dict]


def methods() -> dict[str, Method]:
    """Family, pipeline and arguments of each method, by name."""
    found = {"stock (best of 1)": ("best-of-n", BestOfNPipeline, {"num_candidates": 1})}
    found |= {f"best of {n}": ("best-of-n", BestOfNPipeline, {"num_candidates": n}) for n in (2, 4, 8)}
    found["zero-order, 2 x 4"] = ("best-of-n", BestOfNPipeline, {"num_candidates": 4, "rounds": 2, "search": "zero_order"})
    for preset, scales in STRENGTHS.items():
        found |= {f"{preset}, {scale:g}": ("guidance", RewardGuidedPipeline, {"preset": preset, "reward_scale": scale}) for scale in scales}
    for name, optimizer, number in (("ReNO", "sgd", 10), ("D-Flow", "lbfgs", 5)):
        found[f"{name}, {number} iterations"] = ("noise", NoiseOptimizationPipeline, {"optimizer": optimizer, "num_iterations": number})
    steered = {"reward_scale": LAMBDA, "batch_size": 32}
    found["SDE twin, 1 particle"] = ("steering", ParticleSteeringPipeline, {**steered, "num_particles": 1})
    for n in (4, 8):
        found[f"bootstrap, {n} particles"] = ("steering", ParticleSteeringPipeline, {**steered, "num_particles": n})
        found[f"twisted, {n} particles"] = ("steering", ParticleSteeringPipeline, {**steered, "num_particles": n, "gradient": True})
    found["SVDD, 8 candidates"] = ("steering", ParticleSteeringPipeline, {**steered, "num_particles": 8, "method": "svdd"})
    return found


class Rows:
    """Counts the rows that go through a module, and those that a gradient comes back through. Gated calls never reach it."""

    def __init__(self, module: nn.Module):
        self.forward = self.backward = 0
        forward = module.forward

        def counted(*args, **kwargs):
            output = forward(*args, **kwargs)
            result = output if isinstance(output, Tensor) else output[0]
            self.forward += len(result)
            if result.requires_grad:
                result.register_hook(self._came_back)
            return output

        module.forward = counted

    def _came_back(self, gradient: Tensor) -> None:
        self.backward += len(gradient)


@dataclass
class Result:
    """Of one method: its costs an image, its images (B, 3, H, W), and both rewards of them (B,)."""

    family: str
    rows: float
    gradients: float
    decoded: float
    seconds: float
    images: Tensor
    guided: Tensor
    heldout: Tensor


def measure(model: str, prompts: list[str], steps: int, guidance_scale: float, only: str) -> dict[str, Result]:
    stock = DiffusionPipeline.from_pretrained(embedded.path(model))
    stock.set_progress_bar_config(disable=True)
    (denoiser,) = denoisers(stock).values()
    calls, decodes = Rows(denoiser), Rows(stock.vae.decoder)
    guided, heldout = load_reward("clip_score", model=embedded.path("mini-clip")), load_reward("scene_score")
    call = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "output_type": "pt", **CALL[model]}
    results = {}
    for name, (family, cls, arguments) in methods().items():
        if not re.match(f"stock|{only}", name):
            continue
        before, started = (calls.forward, calls.backward, decodes.forward), time.process_time()
        generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
        images = torch.as_tensor(cls(stock, reward=guided)(prompts, generator=generators, **call, **arguments).images)
        seconds, after = time.process_time() - started, (calls.forward, calls.backward, decodes.forward)
        costs = [(b - a) / len(prompts) for a, b in zip(before, after)]
        results[name] = Result(family, *costs, seconds / len(prompts), images, guided(images, prompts), heldout(images, prompts)["reward"])
        print(row(name, results[name], next(iter(results.values()))), flush=True)
    return results


# --- what is shown -----------------------------------------------------------------------------------------------------

HEADER = """| method | denoiser rows | gradient rows | decoded | CPU s | clip_score (guided) | gain | scene_score (held out) | gain |
|---|---|---|---|---|---|---|---|---|"""


def row(name: str, result: Result, stock: Result) -> str:
    """Means over the prompts, and gains on the stock sample of the same prompt and seed, with standard errors."""
    cells = [f"{result.rows:.0f}", f"{result.gradients:.0f}", f"{result.decoded:.0f}", f"{result.seconds:.2f}"]
    for own, other in ((result.guided, stock.guided), (result.heldout, stock.heldout)):
        cells += [f"{own.mean():.3f} ± {error(own):.3f}", "" if result is stock else f"{(own - other).mean():+.3f} ± {error(own - other):.3f}"]
    return f"| {name} | " + " | ".join(cells) + " |"


def error(values: Tensor) -> float:
    return float(values.std() / len(values) ** 0.5)


def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no cheaper point beats, by cost."""
    kept: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if not kept or value > kept[-1][1]:
            kept.append((cost, value))
    return kept


def spread(values: dict[str, float], gap: float) -> dict[str, float]:
    """Heights of labels, in the order of the values and at least `gap` apart, around where they belong."""
    heights: dict[str, float] = {}
    for name in sorted(values, key=values.get):
        heights[name] = max([values[name], *(height + gap for height in list(heights.values())[-1:])])
    shift = sum(heights[name] - values[name] for name in values) / len(values)
    return {name: height - shift for name, height in heights.items()}


def plot(found: dict[str, dict[str, Result]], path: Path) -> None:
    figure = Figure(figsize=(13, 6 * len(found)), layout="constrained")
    axes = figure.subplots(len(found), 2, squeeze=False)
    for (model, results), pair in zip(found.items(), axes):
        for axis, field, title in zip(pair, ("guided", "heldout"), ("clip_score (guided)", "scene_score (held out)")):
            panel(axis, results, field)
            axis.set(title=f"{model}: {title}", xlabel="denoiser rows an image; hollow: with gradients through the denoiser", ylabel="mean, s.e.")
    marks = [Line2D([], [], marker="o", linestyle="", color=color, label=family) for family, color in FAMILIES.items()]
    figure.legend(handles=[*marks, Line2D([], [], color="gray", linestyle="--", label="best at no higher cost")], loc="outside lower center", ncols=4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def panel(axis, results: dict[str, Result], field: str) -> None:
    means = {name: float(getattr(result, field).mean()) for name, result in results.items()}
    cheapest = min(result.rows for result in results.values())
    columns: dict[int, list[str]] = {}
    for name, result in results.items():
        color = FAMILIES[result.family]
        fill = "white" if result.gradients else color
        axis.errorbar(result.rows, means[name], yerr=error(getattr(result, field)), fmt="o", color=color, markerfacecolor=fill, elinewidth=0.5)
        columns.setdefault(round(math.log2(result.rows / cheapest)), []).append(name)
    axis.step(*zip(*front([(results[name].rows, means[name]) for name in results])), where="post", color="gray", linewidth=0.8, linestyle="--")
    gap = 0.028 * (axis.get_ylim()[1] - axis.get_ylim()[0])
    for names in columns.values():
        right = 1.1 * max(results[name].rows for name in names)
        for name, height in spread({name: means[name] for name in names}, gap).items():
            line = {"arrowstyle": "-", "linewidth": 0.4, "color": "gray"}
            axis.annotate(name, (results[name].rows, means[name]), xytext=(right, height), fontsize=7, va="center", arrowprops=line)
    axis.set_xscale("log", base=2)
    axis.set_xlim(0.85 * cheapest, 2.1 * max(result.rows for result in results.values()))
    axis.set_xticks([cheapest * 2**octave for octave in columns], [f"{cheapest * 2**octave:.0f}" for octave in columns])
    axis.grid(alpha=0.3)


def pictures(results: dict[str, Result], prompts: list[str], path: Path, columns: int = 8) -> None:
    """Stock samples, the guidance of the largest held-out reward, best of 8 and steering; equal prompts and seeds."""
    best = max((name for name, result in results.items() if result.family == "guidance"), key=lambda name: results[name].heldout.mean())
    shown = [round(i * (len(prompts) - 1) / (columns - 1)) for i in range(columns)]
    chosen = {"stock (best of 1)": "stock", best: best, "best of 8": "best of 8", "bootstrap, 8 particles": "steering, 8"}
    images = {label: [results[name].images[i] for i in shown] for name, label in chosen.items()}
    comparison(images, [prompts[i] for i in shown], columns, cell=160).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(CALL), default=["mini-sd3"])
    parser.add_argument("--number", type=int, default=24, help="prompts, spread over the list; one image each")
    parser.add_argument("--only", default="", help="methods whose names begin so (a regular expression), for rows without pictures")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance_scale", type=float, default=2.0)
    parser.add_argument("--output", type=Path, default=Path("docs/inference_time.png"))
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    texts = [prompt.text for prompt in load_prompts("mini_heldout")]
    prompts, found = texts[:: max(1, len(texts) // args.number)][: args.number], {}
    for model in args.models:
        print(f"\n{model}\n\n{HEADER}")
        found[model] = measure(model, prompts, args.steps, args.guidance_scale, args.only)
    if args.only:
        return
    plot(found, args.output)
    pictures(next(iter(found.values())), prompts, args.output.with_name(f"{args.output.stem}_samples.png"))


if __name__ == "__main__":
    main()
