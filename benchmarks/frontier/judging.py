"""Judges what a model draws for held-out prompts, at equal seeds for all: reward, independent judge, diversity, exact path KL, rows of the sampling."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from torch import Tensor

from benchmarks.frontier.data import STEPS
from benchmarks.frontier.tasks import CALL, KL_NOISE, TASKS, load_by_name, write_lines
from benchmarks.inference_time import Rows
from diffusers_align.data import Prompt, load_prompts
from diffusers_align.driving.denoisers import denoisers
from diffusers_align.files.levels import digest_of
from diffusers_align.files.paths import front_door
from diffusers_align.policy import Policy
from diffusers_align.rewards.base import score_columns
from diffusers_align.schedulers import sde_twin
from diffusers_align.training.online.sampling import evaluate
from diffusers_align.training.report.evaluation import Session, find_lora, lora_loaded, sampled_kl
from diffusers_align.training.report.statistics import diversity, mean_and_error, pairwise_rms
from diffusers_align.training.run.model_loading import load_pipeline

BATCH = 48


@dataclass(frozen=True)
class Terms:
    """How models are judged: `images` of the held-out prompts in turn, with this guidance, by this judge beside the reward; `kl` trajectories with noise."""

    guidance: float = 3.0
    judge: str = "scene_score"
    images: int = 192
    kl: int = 16


@dataclass(frozen=True)
class Judged:
    """What was drawn and how it was judged: (N,) of each, NaN where there is no score.

    Attributes:
        kl: path KLs in nats, one a trajectory; empty where there is no policy to have one.
        rows: denoiser rows of the sampling, an image.
    """

    reward: Tensor
    judge: Tensor
    diversity: Tensor
    kl: Tensor
    rows: float

    def row(self, base: Judged) -> dict:
        """Means and standard errors, gains paired with the base's at equal prompts and seeds, and the gap: how many standard deviations of the base's
        images the reward has gained more than the judge. Where there is no KL it is null."""
        found = {name: estimate(getattr(self, name)) for name in ("reward", "diversity", "kl")} | {"judged": estimate(self.judge)}
        for name in ("reward", "judge"):
            found[f"{name}_gain"] = estimate(getattr(self, name) - getattr(base, name))
        spreads = [float(values[~values.isnan()].std()) for values in (base.reward, base.judge)]
        gains = [found[f"{name}_gain"]["mean"] / max(spread, 1e-9) for name, spread in zip(("reward", "judge"), spreads)]
        return {**found, "gap": gains[0] - gains[1], "rows_an_image": self.rows}


def estimate(values: Tensor) -> dict[str, float]:
    return dict(zip(("mean", "se"), mean_and_error(values)))


class Bench:
    """A model, prompts, the reward of a task and a judge.

    Args:
        prompts: a set of the package or a file.
        folder: where the base's numbers are kept, which all others are compared with.
        weights: a digest of the model, the reward and the judge: the kept numbers are of these.
    """

    def __init__(self, task: str, model: str, prompts: str, terms: Terms, folder: Path, weights: str):
        self.task, self.model, self.terms = TASKS[task], model, terms
        found = load_prompts(prompts)
        self.prompts: list[Prompt] = [found[i % len(found)] for i in range(terms.images)]
        self.session = Session(arguments(model, prompts, terms), Accelerator(cpu=True))
        self.pipeline = load_pipeline(self.session.args)
        self.pipeline.set_progress_bar_config(disable=True)
        self.calls = Rows(next(iter(denoisers(self.pipeline).values())))
        self.reward, self.judge = load_by_name(self.task.reward), load_by_name(terms.judge)
        self._kept = folder / f"{digest_of([task, model, [prompt.text for prompt in self.prompts], asdict(terms), weights])[:16]}.json"
        self._base: Judged | None = None

    @property
    def call(self) -> dict:
        """Arguments of the pipeline's call."""
        return {"num_inference_steps": STEPS, "guidance_scale": self.terms.guidance, **CALL[self.model]}

    @property
    def columns(self) -> dict[str, list]:
        """What the rewards get beside images and prompts."""
        return {name: [prompt.columns[name] for prompt in self.prompts] for name in self.prompts[0].columns}

    def policy(self) -> Policy:
        """A new one for each model: it remembers encoded prompts."""
        return Policy(self.pipeline, sde_twin(self.pipeline.scheduler, **KL_NOISE[self.model]), **self.call)

    def of_lora(self, path: Path | None) -> Judged:
        """The model with a LoRA, or as it is."""
        with lora_loaded(self.pipeline, find_lora(str(path)) if path else None, str(path)):
            policy, before = self.policy(), self.calls.forward
            images = torch.stack(evaluate(self.session, policy, {}, self.prompts, len(self.prompts), len(self.prompts)).images)
            rows = (self.calls.forward - before) / len(self.prompts)
            kl = torch.zeros(self.terms.kl)
            if path is not None and self.terms.kl:
                kl = sampled_kl(self.session, policy, self.prompts, self.terms.kl, lambda number: None)["nats"]
        return self.of_images(images, rows, kl)

    def drawn(self, path: Path | None, prompts: list[Prompt]) -> list[Tensor]:
        """One image (3, H, W) a prompt, by the model with a LoRA, or as it is; seeds go by place."""
        with lora_loaded(self.pipeline, find_lora(str(path)) if path else None, str(path)):
            return evaluate(self.session, self.policy(), {}, prompts, len(prompts), len(prompts)).images

    def of_images(self, images: Tensor, rows: float, kl: Tensor | None = None) -> Judged:
        """Images (N, 3, H, W) in [0, 1] of the bench's prompts."""
        texts = [prompt.text for prompt in self.prompts]
        scores = [torch.cat([self._scores(reward, part, images, texts) for part in self._parts()]) for reward in (self.reward, self.judge)]
        several = min(Counter(texts).values()) > 1
        spread = diversity(images.flatten(1), texts, pairwise_rms) if several else torch.full((1,), torch.nan)
        return Judged(*(values.double() for values in (*scores, spread, torch.full((1,), torch.nan) if kl is None else kl)), rows=rows)

    def _parts(self) -> list[range]:
        return [range(start, min(start + BATCH, len(self.prompts))) for start in range(0, len(self.prompts), BATCH)]

    @torch.no_grad()
    def _scores(self, reward, part: range, images: Tensor, texts: list[str]) -> Tensor:
        columns = {name: [values[i] for i in part] for name, values in self.columns.items()}
        found = score_columns(reward, images[part.start : part.stop].float(), [texts[i] for i in part], columns, "mask")
        return found[self.task.part if reward is self.reward and self.task.part else "reward"].cpu()

    @property
    def base(self) -> Judged:
        """The pretrained model; kept in a file, for later calls."""
        if self._base is None:
            if not self._kept.is_file():
                found = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in asdict(self.of_lora(None)).items()}
                write_lines(self._kept, [found])
            kept = json.loads(self._kept.read_text())
            self._base = Judged(**{name: torch.tensor(value, dtype=torch.float64) if isinstance(value, list) else value for name, value in kept.items()})
        return self._base


def arguments(model: str, prompts: str, terms: Terms) -> SimpleNamespace:
    """The flags of `evaluate.py`, as its parser gives them."""
    spec = importlib.util.spec_from_file_location("evaluate", front_door("training_scripts", "evaluate"))
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    words = ["--pretrained_model_name_or_path", model, "--lora", "none", "--prompts", prompts, "--reward", "none", "--output_dir", "none"]
    words += ["--batch_size", str(BATCH), "--mixed_precision", "no"]
    return SimpleNamespace(**vars(script.parse_args(words)))
