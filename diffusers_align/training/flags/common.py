"""The flags that scripts share, in diffusers' names: the optimisation, the output, and all together with those of `model.py` and `task.py`."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Interval
from pydantic import model_validator

from .model import ComputeArguments, ModelArguments
from .options import Arguments, Count, Decay, NonNegative, Seed, option, required
from .task import EarlyStopArguments, TaskArguments

TRACKERS = ("tensorboard", "wandb", "trackio")
# Those of diffusers.optimization that need nothing but a number of steps, by whether they warm up.
WARMING = ("constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
LearningRate = Annotated[float, Interval(gt=0, le=10)]
SDEType = Literal["flow_grpo", "dance_grpo", "cps", "memoryless", "memoryless_em"]
# How flags that choose the noise of flow matching act: the memoryless kernels have no strength.
WITH_STRENGTH = (None, "flow_grpo", "dance_grpo", "cps")


class SeedArguments(Arguments):
    """run"""

    seed: Seed = option(42, "of all that is drawn: prompts, noise, initial weights")


class SignalArguments(Arguments):
    """run"""

    allow_no_signal: bool = option(False, "go on, and end with status 0, although nothing is learned", advanced=True, resume="free")


class PlaceArguments(Arguments):
    """output"""

    output_dir: str = required("the folder of all that comes out: weights or data, pictures, numbers, and what a resumed run needs", resume="unsaid")


class OptimisationArguments(SeedArguments, SignalArguments):
    """optimisation"""

    num_epochs: Count = option(100, "rollouts, or stretches of the data set, each with its updates and a line of the log", resume="takes effect")
    train_batch_size: Count = option(8, "samples of a rollout or replay at a time, at most, on each process", resume="free")
    gradient_accumulation_steps: Count | None = option(
        None,
        "batches of --train_batch_size per optimizer step, over all processes; if absent half an epoch's, so two steps per epoch (one of train_nft.py, "
        "train_awm.py, train_adjoint_matching.py)",
        resume="free",
    )
    learning_rate: LearningRate = option(3e-4, "of AdamW", resume="takes effect")
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"] = option(
        "constant", "how the learning rate goes on, by optimizer steps", advanced=True, resume="takes effect"
    )
    lr_warmup_steps: Annotated[int, Interval(ge=0, le=10**9)] = option(
        0, "optimizer steps from 0 to the learning rate", needs={"lr_scheduler": WARMING}, advanced=True, resume="takes effect"
    )
    adam_beta1: Decay = option(0.9, "decay of the gradient's mean", advanced=True, resume="takes effect")
    adam_beta2: Decay = option(0.999, "decay of its square's mean", advanced=True, resume="takes effect")
    adam_weight_decay: Annotated[float, Interval(ge=0, le=100)] = option(
        1e-4, "times the learning rate, the share of the weights that a step takes off", advanced=True, resume="takes effect"
    )
    adam_epsilon: Annotated[float, Interval(gt=0, le=1)] = option(1e-8, "added to the denominator", advanced=True, resume="takes effect")
    use_8bit_adam: bool = option(False, "Adam's moments in 8 bits, by bitsandbytes: a quarter of their memory", advanced=True)
    max_grad_norm: NonNegative = option(1.0, "clip the gradient at this norm; 0 does not clip", advanced=True, resume="takes effect")
    use_ema: bool = option(False, "evaluate and save an exponential moving average of the LoRA", advanced=True)
    ema_decay: Decay = option(0.9, "of the average, every --ema_interval optimizer steps", needs={"use_ema": True}, advanced=True, resume="takes effect")
    ema_interval: Count = option(8, "optimizer steps between two updates of the average", needs={"use_ema": True}, advanced=True, resume="takes effect")

    @model_validator(mode="after")
    def _check_weight_decay(self):
        if self.learning_rate * self.adam_weight_decay >= 1:
            raise ValueError(
                f"--learning_rate {self.learning_rate:g} times --adam_weight_decay {self.adam_weight_decay:g} is 1 or more: "
                "each step would take off all of the weights"
            )
        return self


class OutputArguments(PlaceArguments):
    """output"""

    checkpointing_epochs: Count = option(20, "a checkpoint every so many epochs", advanced=True, resume="free")
    checkpoints_total_limit: Count | None = option(None, "keep at most so many; all if absent", advanced=True, resume="free")
    resume_from_checkpoint: str | None = option(None, "a checkpoint folder, or 'latest'", resume="unsaid")
    allow_changes: bool = option(
        False,
        "resume although flags that decide what is learned differ from the checkpoint's",
        needs={"resume_from_checkpoint": True},
        advanced=True,
        resume="unsaid",
    )
    validation_epochs: Count = option(20, "a sample grid at fixed seeds every so many epochs", resume="measured")
    num_validation_images: Annotated[int, Interval(ge=1, le=10**4)] = option(16, "its images", advanced=True, resume="free")
    report_to: str = option("none", f"none, {', '.join(TRACKERS)}, or several, comma-separated (pictures go to the first two)", resume="free")
    run_name: str | None = option(None, "name of the run in the trackers; the output folder's if absent", advanced=True, resume="free")
    push_to_hub: bool = option(False, "upload the output folder at the end", resume="free")
    hub_model_id: str | None = option(None, "repository; named after the output folder if absent", needs={"push_to_hub": True}, advanced=True, resume="free")
    hub_token: str | None = option(None, "token; the stored login's if absent", needs={"push_to_hub": True}, advanced=True, resume="secret")

    @property
    def trackers(self) -> list[str]:
        """The trackers of `--report_to`."""
        return [] if self.report_to == "none" else [name.strip() for name in self.report_to.split(",")]

    @model_validator(mode="after")
    def _check_trackers(self):
        if self.hub_token and "wandb" in self.trackers:
            raise ValueError("--hub_token would be logged to wandb with the other arguments; log in with `hf auth login` instead")
        for name in self.trackers:
            if name not in TRACKERS:
                raise ValueError(f"--report_to: unknown tracker {name!r}; choose among none, {', '.join(TRACKERS)}")
            # accelerate skips a tracker that is not installed without a word.
            if importlib.util.find_spec(name) is None:
                raise ValueError(f"--report_to {name}: not installed. Run `pip install {name}`, or pass --report_to none.")
        if self.run_name and not self.trackers:
            raise ValueError("--run_name names the run in a tracker, and --report_to names none: leave it out, or give --report_to")
        return self


class RunArguments(ComputeArguments, OptimisationArguments, OutputArguments):
    """run"""


class TrainingArguments(ModelArguments, TaskArguments, EarlyStopArguments, RunArguments):
    """The flags of every script that trains a LoRA; a script's own class adds those of its algorithm."""


class SamplingArguments(TrainingArguments):
    """prompts and reward"""

    reward_in_background: bool = option(False, "score a batch while the next is sampled: for rewards on servers or on the CPU", advanced=True, resume="free")


def check_output_dir(path: str) -> Path:
    """Make the output folder and write to it now rather than find out after training that it cannot be done.

    Raises:
        OSError: the folder cannot be made or written.
    """
    folder = Path(path)
    if file := next((place for place in (folder, *folder.parents) if place.exists() and not place.is_dir()), None):
        raise OSError(f"Cannot write to --output_dir {path}: {file} is a file. Choose another folder, which is made if it is not there.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test-{os.getpid()}"
        probe.write_bytes(b"\0" * 65536)
        probe.unlink()
    except OSError as error:
        raise OSError(f"Cannot write to --output_dir {path}: {error}. Choose another folder or free some space.") from error
    return folder
