"""Rows of the tables that come without a LoRA: real scenes, search and guidance at inference, and a flow behind the model."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.frontier.judging import BATCH, Bench, Judged
from benchmarks.frontier.methods import CONTROL, INFERENCE
from benchmarks.inference_time import methods as inference_methods
from diffusers_align.embedded.scenes import COLORS, Scene, parse, render
from diffusers_align.pipelines.preference_flow import PreferenceFlowPipeline
from diffusers_align.policy import noise_seed
from diffusers_align.training.online.sampling import evaluate

REAL, BEST = "real scenes", "best of 8"
# Of benchmarks/inference_time.py, one of each kind; the reward that they follow is the task's.
CHOSEN = (BEST, "best of 2", "mpgd, 0.2", "freedom, 0.2", "universal, 8", "ReNO, 10 iterations", "bootstrap, 8 particles", "SVDD, 8 candidates")
ROUTES = {REAL: CONTROL, **{name: CONTROL if name == BEST else INFERENCE for name in CHOSEN}}


def judged(name: str, bench: Bench) -> Judged:
    """One of `ROUTES` on a bench."""
    return of_real_scenes(bench) if name == REAL else of_pipeline(name, bench)


def of_real_scenes(bench: Bench) -> Judged:
    """Rendered scenes of the captions, with the wish that a prompt does not state (a background) granted."""
    size, images = int(bench.pipeline.vae.config.sample_size), []
    for i, prompt in enumerate(bench.prompts):
        asked, rng = parse(prompt.text), random.Random(i)
        color = prompt.columns.get("background") or asked.get("color") or rng.choice(list(COLORS))
        scene = Scene(asked["object"], asked.get("count", 1), color, asked.get("position"))
        images.append(torch.from_numpy(np.array(render(scene, rng, size))).permute(2, 0, 1).float() / 255)
    return bench.of_images(torch.stack(images), rows=0.0)


def of_pipeline(name: str, bench: Bench) -> Judged:
    """A method of inference around the stock pipeline, following the task's reward; seeds are those of all other rows."""
    _, cls, options = inference_methods()[name]
    before, images = bench.calls.forward, []
    for start in range(0, len(bench.prompts), BATCH):
        part = range(start, min(start + BATCH, len(bench.prompts)))
        generators = [torch.Generator().manual_seed(noise_seed(bench.session.args.seed, "evaluation", i)) for i in part]
        columns = {name: [values[i] for i in part] for name, values in bench.columns.items()}
        texts = [bench.prompts[i].text for i in part]
        made = cls(bench.pipeline, reward=Followed(bench))(texts, generator=generators, columns=columns, output_type="pt", **bench.call, **options)
        images.append(torch.as_tensor(made.images).float().cpu())
    return bench.of_images(torch.cat(images).clamp(0, 1), (bench.calls.forward - before) / len(bench.prompts))


class Followed:
    """The task's reward, or the part of it that results are given in, as a pipeline follows it."""

    def __init__(self, bench: Bench):
        self.reward, self.part = bench.reward, bench.task.part

    def __call__(self, images: Tensor, prompts: list[str], **columns) -> Tensor:
        found = self.reward(images, prompts, **columns)
        return found[self.part or "reward"] if isinstance(found, dict) else found


def of_flow(folder: Path, bench: Bench) -> Judged:
    """A preference flow behind the base: its images, moved. The flow's own rows count, at one network of its own."""
    images = torch.stack(base_images(bench))
    flow, moved = PreferenceFlowPipeline.from_pretrained(folder), []
    flow.set_progress_bar_config(disable=True)
    for start in range(0, len(images), BATCH):
        texts = [prompt.text for prompt in bench.prompts[start : start + BATCH]]
        moved.append(torch.as_tensor(flow(images[start : start + BATCH], texts, output_type="pt").images).float().cpu())
    return bench.of_images(torch.cat(moved).clamp(0, 1), bench.base.rows + FLOW_ROWS)


FLOW_ROWS = 20  # ten steps of Heun's method


def base_images(bench: Bench) -> list[Tensor]:
    """What the pretrained model draws, at the seeds of all rows."""
    return evaluate(bench.session, bench.policy(), {}, bench.prompts, len(bench.prompts), len(bench.prompts)).images
