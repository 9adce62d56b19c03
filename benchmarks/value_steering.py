"""Value steering against best-of-n and SVDD at equal denoiser calls, on the embedded mini-sd.

    python benchmarks/value_steering.py

Trains the Q-function by `value_steering_mini_sd.yaml`, then draws 96 images of held-out prompts by each method with one, two and four times the plain
sampler's denoiser calls, all on the same SDE sampler. Both are kept in the output folder: a command that is stopped goes on where it was. Steered samples
become best-of-n as plain ones do: n of them are drawn, and the reward takes one. `scene_score` is a classifier that no method sees. Calls are counted at the
denoiser, in rows an image.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from inference_time import Rows
from one_thread import ROOT, call
from torch import Tensor

from diffusers_align import embedded, noise_seed
from diffusers_align.data import load_prompts
from diffusers_align.data.prompts import fields_of
from diffusers_align.driving.scheduler_hook import denoisers
from diffusers_align.pipelines.particle_steering import ParticleSteeringPipeline
from diffusers_align.pipelines.value_steering import SteeredPolicy, Steering, load_value
from diffusers_align.rewards import load_reward
from diffusers_align.rewards.base import score_columns
from diffusers_align.training.report.statistics import mean_and_error

RECIPE = ROOT / "training_scripts" / "recipes" / "value_steering_mini_sd.yaml"
CALL = {"num_inference_steps": 6, "guidance_scale": 1.0}
NOISES = (8, 128)
BATCH = 48


@dataclass
class Result:
    """Of one method: denoiser rows and CPU seconds an image, the rewards (N,) of what it returns, and those of the classifier."""

    rows: float
    seconds: float
    reward: Tensor
    heldout: Tensor


def train(folder: Path) -> None:
    """The recipe's run, where there is none yet."""
    if not (folder / "value").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        script = ROOT / "training_scripts" / "train_value_steering.py"
        again = ["--resume_from_checkpoint", "latest"] if list(folder.glob("checkpoint-*")) else []
        call([sys.executable, str(script), "--config", str(RECIPE), "--output_dir", str(folder), *again], folder / "log.txt")


class Bench:
    """The sampler, its counters, and the judges."""

    def __init__(self, prompts, number: int):
        pipeline = DiffusionPipeline.from_pretrained(embedded.path("mini-sd"))
        pipeline.set_progress_bar_config(disable=True)
        self.policy = SteeredPolicy(pipeline, **CALL)
        (denoiser,) = denoisers(pipeline).values()
        self.counter = Rows(denoiser)
        self.asked = [prompts[i % len(prompts)] for i in range(number)]
        self.rewards = [load_reward(name) for name in ("background_color", "scene_score")]

    def parts(self) -> list[range]:
        return [range(start, min(start + BATCH, len(self.asked))) for start in range(0, len(self.asked), BATCH)]

    def scores(self, images: Tensor, rows: range) -> Tensor:
        """(2, B): the reward and the classifier's."""
        asked = [self.asked[i] for i in rows]
        columns = fields_of(asked)
        return torch.stack([score_columns(r, images.float(), [p.text for p in asked], columns, "mask")["reward"] for r in self.rewards])

    def methods(self, value, most: int) -> dict[str, Callable[[], list[Result]]]:
        """What is compared, by name, with the number of samples or candidates to be filled in."""
        found = {"plain, best of {}": lambda: self.sampled(None, most)}
        found["value steering (32 noises), best of {}"] = lambda: self.sampled(Steering(value, 32), most)
        for n in (2**i for i in range(1, most.bit_length())):
            found[f"SVDD, {n} candidates"] = lambda n=n: [self.svdd(n)]
        for number in NOISES:
            found[f"value steering ({number} noises), best of {{}}"] = lambda number=number: self.sampled(Steering(value, number), 1)
        found["any of 32 noises (control)"] = lambda: self.sampled(Steering(value, 32, float("inf")), 1)
        return found

    def sampled(self, steering: Steering | None, number: int) -> list[Result]:
        """Best of the first 1, 2, ... `number` samples, each at its own cost; powers of two alone."""
        self.policy.steering = steering
        before, started, drawn = self.counter.forward, time.process_time(), []
        for j in range(number):
            parts = []
            for rows in self.parts():
                seeds = [noise_seed("value steering", i, j) for i in rows]
                trajectory = self.policy.rollout([self.asked[i].text for i in rows], seeds=seeds)
                parts.append(self.scores(self.policy.decode(trajectory.final, trajectory.condition), rows))
            drawn.append(torch.cat(parts, 1))
        share = [(self.counter.forward - before) / number / len(self.asked), (time.process_time() - started) / number / len(self.asked)]
        found, n = [], 1
        while n <= number:
            among = torch.stack(drawn[:n], 2)  # (2, N, n)
            best = among[0].nan_to_num(nan=-torch.inf).argmax(1)[:, None]
            found.append(Result(n * share[0], n * share[1], *(scores.gather(1, best)[:, 0] for scores in among)))
            n *= 2
        return found

    def svdd(self, number: int) -> Result:
        """SVDD with so many candidates a step, judged by the reward of their predicted clean samples."""
        self.policy.steering = None
        before, started, parts = self.counter.forward, time.process_time(), []
        reward = self.rewards[0]
        for rows in self.parts():
            asked = [self.asked[i] for i in rows]
            generators = [torch.Generator().manual_seed(noise_seed("value steering", i)) for i in rows]
            pipe = ParticleSteeringPipeline(self.policy.pipeline, reward=reward)
            steered = {"method": "svdd", "num_particles": number, "scheduler": self.policy.scheduler, "batch_size": BATCH, "columns": fields_of(asked)}
            images = pipe([p.text for p in asked], generator=generators, output_type="pt", **steered, **CALL).images
            parts.append(self.scores(torch.as_tensor(images), rows))
        cost = (self.counter.forward - before) / len(self.asked), (time.process_time() - started) / len(self.asked)
        return Result(*cost, *torch.cat(parts, 1))


def table(results: dict[str, Result], plain: Result) -> str:
    """Means with standard errors, and gains over one plain sample of the same prompts, paired."""
    lines = ["| method | denoiser rows | CPU s | background_color (steered by) | gain | scene_score (held out) | gain |", "|---|---|---|---|---|---|---|"]
    for name, result in results.items():
        cells = [f"{result.rows:.0f}", f"{result.seconds:.2f}"]
        for values, base in ((result.reward, plain.reward), (result.heldout, plain.heldout)):
            (mean, error), (gain, gain_error) = mean_and_error(values), mean_and_error(values - base)
            cells += [f"{mean:.3f} ± {error:.3f}", f"{gain:+.3f} ± {gain_error:.3f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/value_steering_mini_sd"), help="of the training run, which is made if it is not there")
    parser.add_argument("--samples", type=int, default=96, help="images of each method")
    parser.add_argument("--most", type=int, default=4, help="times the plain sampler's calls, at most")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    train(args.output_dir)
    bench, value = Bench(load_prompts("likes_blue_heldout"), args.samples), load_value(args.output_dir)
    file = args.output_dir / f"equal_calls_{args.samples}_{args.most}.json"
    kept = json.loads(file.read_text()) if file.is_file() else {}
    for name, measured in bench.methods(value, args.most).items():
        if name not in kept:
            kept[name] = [[r.rows, r.seconds, r.reward.tolist(), r.heldout.tolist()] for r in measured()]
            file.write_text(json.dumps(kept))
    found = {name: [Result(rows, seconds, *map(torch.tensor, scores)) for rows, seconds, *scores in of_method] for name, of_method in kept.items()}
    results = {name.format(2**i): result for name, of_method in found.items() for i, result in enumerate(of_method)}
    print(table(results, found["plain, best of {}"][0]))


if __name__ == "__main__":
    main()
