"""Learning from recorded steps, one's own or stored ones: log-probabilities of all samples, gradients from coefficients, trajectories in a folder.

`train_d3po.py` alone has it: its pairs join samples of different batches and processes, which no other loss on log-probabilities does.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ...data.files import read_rows
from ...data.prompts import Prompt, prompts_of_epoch
from ...files.weight_files import digest_of_model
from ...policy import Policy
from ...trajectory import Trajectory
from ..run.division import division_of
from .policy_gradient import add_gradient
from .sampling import NOISE_FIELDS, Samples

# Of a pipeline's call, by the flags of `make_preferences.py` and of training scripts alike.
CALL = ("num_inference_steps", "guidance_scale", "height", "width", "call_kwargs")


def log_probs(run, policy: Policy, samples: Samples, steps: list[int]) -> Tensor:
    """(N, S) nats, float64 on the CPU: those of the recorded `steps` of all processes' samples under the current weights, without gradient."""
    found = []
    for trajectory, index in zip(samples.batches, samples.index):
        with run.accelerator.autocast():
            transitions = policy.transitions(trajectory, steps)
        values = torch.stack([transitions[k].log_prob(trajectory.actions[:, k]) for k in steps], 1)
        found += zip(index.tolist(), values.double().cpu())
    return torch.stack([values for _, values in sorted(gather_object(found), key=lambda pair: pair[0])])


def descend(run, policy: Policy, samples: Samples, steps: list[int], coefficients: Tensor) -> None:
    """Add to the parameters' gradient that of the sum of `coefficients` (N, S) times the log-probabilities of the recorded `steps`.

    Of any loss on log-probabilities, however it pairs the samples, the coefficients are its derivatives: each sample is replayed once,
    in memory for one denoiser step, on whichever process has it.
    """
    for trajectory, index in zip(samples.batches, samples.index):
        add_gradient(run, policy, trajectory, steps, _weighted(trajectory, dict(zip(steps, coefficients[index].to(policy.device).unbind(1)))))


def _weighted(trajectory: Trajectory, weights: dict[int, Tensor]):
    """The sum of the recorded actions' log-probabilities at a step, times its weights (B,)."""
    return lambda k, transition, _: (weights[k] * transition.log_prob(trajectory.actions[:, k])).sum()


class StoredTrajectories:
    """What `make_preferences.py --save_trajectories` wrote: trajectories with rewards, to learn from without sampling.

    Args:
        folder: its output folder.
        model: the pipeline that is trained, by the name that the folder was made with.
        group_size: images per prompt, the first so many; prompts with fewer are left out.
        revision, variant: of the pipeline.

    Attributes:
        prompts: those that have so many.
        noise: the fields of the SDE scheduler that drew them.
        call: `CALL` as they were for that.

    Raises:
        ValueError: the folder holds no trajectories, those of another model or of one with a LoRA, or of no prompt enough.
    """

    def __init__(self, folder: str, model: str, group_size: int, revision: str | None = None, variant: str | None = None):
        self.folder = Path(folder)
        files = [self.folder / "sampling.json", self.folder / "scored" / "metadata.jsonl"]
        if not all(file.is_file() for file in files) or not (self.folder / "trajectories").is_dir():
            raise ValueError(f"{folder} holds no trajectories: give an --output_dir of make_preferences.py --save_trajectories.")
        settings = json.loads(files[0].read_text())
        wanted = {"pretrained_model_name_or_path": model, "revision": revision, "variant": variant, "lora": None}
        if other := [f"{name} {settings.get(name)!r} and not {value!r}" for name, value in wanted.items() if settings.get(name) != value]:
            raise ValueError(
                f"The trajectories of {folder} are of {', '.join(other)}: train the model that drew them; with a LoRA in it, draw new ones without."
            )
        if settings.get("model_weights") not in (None, digest_of_model(model)):
            raise ValueError(f"The trajectories of {folder} are of other weights than {model} holds now: train the model that drew them, or draw new ones.")
        self.noise = {name: settings[name] for name in NOISE_FIELDS if settings.get(name) is not None}
        self.call = {name: settings.get(name) for name in CALL}
        groups: dict[str, list[dict]] = defaultdict(list)
        for row in read_rows(files[1])[0]:
            groups[Path(row["image"]).stem.rpartition("_")[0]].append(row)
        self.groups = [rows[:group_size] for rows in groups.values() if len(rows) >= group_size]
        if not self.groups:
            raise ValueError(f"No prompt of {folder} has {group_size} images with a reward: lower --group_size.")
        own = ("prompt", "image", "reward")
        self.prompts = [Prompt(rows[0]["prompt"], {name: value for name, value in rows[0].items() if name not in own}) for rows in self.groups]

    def hand_over(self, args) -> list[str]:
        """Set the flags of the pipeline's call to those that the trajectories were drawn with, so that what is judged is what is trained. Returns what is
        to be said of it.

        Raises:
            ValueError: others were given.
        """
        drawn = {**self.call, "num_inference_steps": self.call["num_inference_steps"] or self._load(self.groups[0][0], torch.device("cpu")).num_steps}
        if other := [f"--{name} {getattr(args, name)}" for name, value in drawn.items() if name in args.model_fields_set and getattr(args, name) != value]:
            were = ", ".join(f"{name} {value}" for name, value in drawn.items() if value is not None)
            raise ValueError(
                f"The trajectories of {self.folder} were drawn with {were}, and are learned from as they are: leave out {', '.join(other)}. "
                "Evaluations have --eval_num_inference_steps and --eval_guidance_scale of their own."
            )
        changed = {name: value for name, value in drawn.items() if getattr(args, name) != value}
        for name, value in changed.items():
            setattr(args, name, value)
        said = ", ".join(f"--{name} {value}" for name, value in changed.items())
        return [f"As the trajectories were drawn, evaluations too: {said}."] if said else []

    def epoch(self, run, epoch: int, num_prompts: int) -> Samples:
        """The trajectories of `num_prompts` prompts, as `sample_epoch` would have drawn them."""
        chosen = prompts_of_epoch(self.prompts, num_prompts, run.args.seed, epoch)
        rows = [(place, row) for place, prompt in enumerate(chosen) for row in self.groups[prompt]]
        index = [list(part) for part in division_of(run, len(rows)).batches]
        batches = [Trajectory.cat([self._load(rows[i][1], run.accelerator.device) for i in part]) for part in index]
        rewards, asked = torch.tensor([row["reward"] for _, row in rows]), [self.prompts[chosen[place]] for place, _ in rows]
        groups = torch.tensor([place for place, _ in rows])
        return Samples(batches, [torch.tensor(part) for part in index], [p.text for p in asked], groups, rewards, {"reward": rewards}, asked)

    def _load(self, row: dict, device: torch.device) -> Trajectory:
        return Trajectory.load(self.folder / "trajectories" / f"{Path(row['image']).stem}.safetensors").to(device)
