"""The flags that scripts share, in diffusers' names: the pipeline and its calls, the task, the optimisation, the output."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Interval
from pydantic import field_validator, model_validator

from .options import Arguments, Count, Decay, Guidance, NonNegative, Pixels, Positive, Rank, Seed, Steps, option, required
from .recipes import suggestion

TRACKERS = ("tensorboard", "wandb", "trackio")
EMBEDDED = ("mini-sd", "mini-sd3")
# Those of diffusers.optimization that need nothing but a number of steps, by whether they warm up.
WARMING = ("constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
# What every call gets from the package itself.
OWN_CALL_KWARGS = (
    "prompt", "generator", "latents", "output_type", "return_dict", "num_images_per_prompt", "num_videos_per_prompt", "callback",
    "callback_on_step_end", "callback_on_step_end_tensor_inputs",
)  # fmt: skip
LearningRate = Annotated[float, Interval(gt=0, le=10)]
SDEType = Literal["flow_grpo", "dance_grpo", "cps", "memoryless", "memoryless_em"]
EvalScheduler = Literal["stock", "twin"]
# How flags that choose the noise of flow matching act: the memoryless kernels have no strength.
WITH_STRENGTH = (None, "flow_grpo", "dance_grpo", "cps")


class PrecisionArguments(Arguments):
    """compute"""

    mixed_precision: Literal["no", "fp16", "bf16"] = option("no", "dtype of the frozen weights and of autocast")


class ComputeArguments(PrecisionArguments):
    """compute"""

    gradient_checkpointing: bool = option(False, "recompute the denoiser's activations in the backward pass")
    allow_tf32: bool = option(False, "TF32 matrix products on Ampere and later")


class PipelineArguments(Arguments):
    """model"""

    pretrained_model_name_or_path: str = required("a diffusers pipeline: Hub name, folder, .safetensors file, or an embedded model (mini-sd, mini-sd3)")
    single_file_config: str | None = option(None, "of a .safetensors file as the model: a folder or Hub name of a pipeline of its architecture")
    revision: str | None = option(None, "revision of the pipeline on the Hub")
    variant: str | None = option(None, "variant of its files, such as fp16")

    @model_validator(mode="after")
    def _check_name(self):
        name = self.pretrained_model_name_or_path
        if name and name not in EMBEDDED and "/" not in name and not Path(name).is_dir() and (near := suggestion(name, EMBEDDED)):
            raise ValueError(f"--pretrained_model_name_or_path {name} is no folder and no embedded model{near}")
        return self


class SizeArguments(Arguments):
    """model"""

    height: Pixels | None = option(None, "pixels; the pipeline's default if absent")
    width: Pixels | None = option(None, "pixels; the pipeline's default if absent")
    call_kwargs: dict[str, Any] = option({}, "other arguments of the pipeline's call, as JSON: '{\"num_frames\": 33}'")

    @model_validator(mode="after")
    def _check_call_kwargs(self):
        for name in self.call_kwargs:
            if name in type(self).model_fields:
                raise ValueError(f"--call_kwargs holds {name}, which has a flag of its own: use --{name}")
            if name in OWN_CALL_KWARGS:
                raise ValueError(f"--call_kwargs holds {name}, which the script gives the pipeline itself: leave it out")
        return self


class CallArguments(SizeArguments):
    """model"""

    num_inference_steps: Steps | None = option(None, "solver steps; the pipeline's default if absent")
    guidance_scale: Guidance | None = option(None, "classifier-free guidance; the pipeline's default if absent")


class ModelArguments(PipelineArguments, CallArguments):
    """model"""

    shard_denoiser: bool = option(False, "spread the frozen denoiser over the processes (FSDP2); the LoRA stays whole")
    rank: Rank = option(32, "rank of the LoRA")
    lora_alpha: Annotated[int, Interval(ge=1, le=65536)] | None = option(None, "scale of the LoRA; twice the rank if absent")
    lora_layers: str | None = option(None, "comma-separated modules that get a LoRA; the attention projections if absent")
    num_inference_steps: Steps = option(10, "solver steps of training rollouts")
    eval_num_inference_steps: Steps | None = option(None, "solver steps of evaluation; as in training if absent")
    eval_scheduler: EvalScheduler = option("stock", "evaluate with the pipeline's own solver, or along the SDE twin's ODE")
    guidance_scale: Guidance | None = option(None, "classifier-free guidance of rollouts, replays and evaluation; the pipeline's default if absent")
    eval_guidance_scale: Guidance | None = option(None, "guidance of evaluation and pictures; as in training if absent")

    @field_validator("lora_layers")
    @classmethod
    def _check_layers(cls, value):
        layers = [layer.strip() for layer in (value or "").split(",")]
        if value is not None and not all(layers):
            raise ValueError("must be names of layers with a comma between two of them")
        return value and ",".join(layers)


class RetryArguments(Arguments):
    """prompts and reward"""

    reward_retries: Annotated[int, Interval(ge=0, le=10**4)] | None = option(
        None, "further attempts of a reward that asks a server, each after a longer pause; 3 if absent"
    )

    @model_validator(mode="after")
    def _check_retries(self):
        flags = (getattr(self, name, None) or [] for name in ("reward", "eval_reward"))
        specs = [spec for value in flags for spec in ([value] if isinstance(value, str) else value)]
        if self.reward_retries is not None and not any(":" in spec or "vlm_judge" in spec for spec in specs):
            asked = " and ".join(specs) or "none"
            raise ValueError(f"--reward_retries is for rewards that ask a server (http://host:port, vlm_judge, one of your own), got {asked}")
        return self


class RewardArguments(RetryArguments):
    """prompts and reward"""

    reward: str = required("built-in reward, module:function, file.py:function, http://host:port, or a sum such as clip_score*1+scene_score*0.5")
    reward_model: str | None = option(None, "checkpoint of the reward's model, where it has one; its public one if absent", needs={"reward": True})
    eval_reward: str | None = option(None, "a second reward, not trained on, to show whether the first was hacked")
    eval_reward_model: str | None = option(None, "checkpoint of the second reward's model", needs={"eval_reward": True})


class PromptArguments(Arguments):
    """prompts and reward"""

    prompts: str = required("a .txt, .jsonl or .csv file, or a shipped set")
    prompt_column: str = option("prompt", "field of the prompt in .jsonl and .csv files; rewards get the other fields")
    input_columns: list[str] | None = option(
        None, "columns that the pipeline's call takes one of a sample, COLUMN or ARGUMENT=COLUMN: image mask_image=mask; strings are files, if not texts"
    )

    @model_validator(mode="after")
    def _check_input_columns(self):
        if self.input_columns is not None:
            from ...data.inputs import parse_input_columns

            parse_input_columns(self.input_columns)
        return self


class TaskArguments(PromptArguments, RewardArguments):
    """prompts and reward"""

    eval_prompts: str | None = option(None, "held-out prompts; the training ones if absent")
    num_eval_samples: Count = option(64, "images of the evaluation before and after")
    invalid_rewards: Literal["error", "mask"] = option("error", "on rewards that are NaN, raise or hang: stop, or mask them")
    reward_timeout: Positive | None = option(None, "seconds that the reward may take for a batch; no limit if absent")


class EarlyStopArguments(Arguments):
    """early stop"""

    early_stop_metric: Literal["reward", "eval_reward"] | None = option(None, "stop when this held-out reward rises no more, and keep the weights of its peak")
    early_stop_patience: Count = option(3, "after so many validations (--validation_epochs) without a new peak", needs={"early_stop_metric": True})
    early_stop_diversity: Annotated[float, Interval(gt=0, lt=1)] | None = option(
        None, "stop below this share of the pretrained model's diversity (RMS of pixels within prompts)"
    )

    @model_validator(mode="after")
    def _check_early_stop(self):
        if self.early_stop_metric and not getattr(self, self.early_stop_metric):
            raise ValueError(f"--early_stop_metric {self.early_stop_metric} needs --{self.early_stop_metric}")
        return self


class OptimisationArguments(Arguments):
    """optimisation"""

    seed: Seed = option(42, "seed of everything: prompts, noise, LoRA")
    num_epochs: Count = option(100, "rollouts, each followed by its updates")
    train_batch_size: Count = option(8, "samples of a rollout or replay at a time, at most, on each process")
    gradient_accumulation_steps: Count | None = option(
        None, "times --train_batch_size are the samples of an optimizer step, of all processes together; half an epoch's if absent (NFT, AWM: all)"
    )
    learning_rate: LearningRate = option(3e-4, "of AdamW")
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"] = option(
        "constant", "how the learning rate goes on, by optimizer steps"
    )
    lr_warmup_steps: Annotated[int, Interval(ge=0, le=10**9)] = option(0, "optimizer steps from 0 to the learning rate", needs={"lr_scheduler": WARMING})
    adam_beta1: Decay = option(0.9, "decay of the gradient's mean")
    adam_beta2: Decay = option(0.999, "decay of its square's mean")
    adam_weight_decay: Annotated[float, Interval(ge=0, le=100)] = option(1e-4, "times the learning rate, the share of the weights that a step takes off")
    adam_epsilon: Annotated[float, Interval(gt=0, le=1)] = option(1e-8, "added to the denominator")
    max_grad_norm: NonNegative = option(1.0, "clip the gradient at this norm; 0 does not clip")
    allow_no_signal: bool = option(False, "go on, and end with status 0, although nothing is learned")
    use_ema: bool = option(False, "evaluate and save an exponential moving average of the LoRA")
    ema_decay: Decay = option(0.9, "of the average, every --ema_interval optimizer steps", needs={"use_ema": True})
    ema_interval: Count = option(8, "optimizer steps between two updates of the average", needs={"use_ema": True})

    @model_validator(mode="after")
    def _check_weight_decay(self):
        if self.learning_rate * self.adam_weight_decay >= 1:
            raise ValueError(
                f"--learning_rate {self.learning_rate:g} times --adam_weight_decay {self.adam_weight_decay:g} is 1 or more: "
                "each step would take off all of the weights"
            )
        return self


class OutputArguments(Arguments):
    """output"""

    output_dir: str = required("LoRA, pictures, metrics, model card and checkpoints")
    checkpointing_epochs: Count = option(20, "a checkpoint every so many epochs")
    checkpoints_total_limit: Count | None = option(None, "keep at most so many; all if absent")
    resume_from_checkpoint: str | None = option(None, "a checkpoint folder, or 'latest'")
    allow_changes: bool = option(
        False, "resume although flags that decide what is learned differ from the checkpoint's", needs={"resume_from_checkpoint": True}
    )
    validation_epochs: Count = option(20, "a sample grid at fixed seeds every so many epochs")
    num_validation_images: Annotated[int, Interval(ge=1, le=10**4)] = option(16, "its images")
    report_to: str = option("none", f"none, {', '.join(TRACKERS)}, or several, comma-separated (pictures go to the first two)")
    run_name: str | None = option(None, "name of the run in the trackers; the output folder's if absent")
    push_to_hub: bool = option(False, "upload the output folder at the end")
    hub_model_id: str | None = option(None, "repository; named after the output folder if absent", needs={"push_to_hub": True})
    hub_token: str | None = option(None, "token; the stored login's if absent", needs={"push_to_hub": True})

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

    reward_in_background: bool = option(False, "score a batch while the next is sampled: for rewards on servers or on the CPU")


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
