"""DDPOTrainer and AlignPropTrainer of an installed TRL (0.23.1)."""

from __future__ import annotations

import random

import torch
import transformers
from accelerate import PartialState

from benchmarks.peers.tasks import LEARNING_RATE, PROMPTS, Task

NEVER = 10**9


def brightness(images, prompts, metadata):
    return images.flatten(1).mean(1), {}


def prompt():
    return random.choice(PROMPTS), {}


def trainer(task: Task):
    """The trainer of the task's method; its LoRA is of rank 4."""
    if not hasattr(transformers, "is_wandb_available"):  # newer ones have it no more
        transformers.is_wandb_available = lambda: False
    from trl import AlignPropConfig, AlignPropTrainer, DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

    PartialState()  # its logger asks for one
    pipeline = DefaultDDPOStableDiffusionPipeline(task.model, pretrained_model_revision=None)
    common = {
        "sample_num_steps": task.steps, "sample_guidance_scale": task.guidance, "train_batch_size": task.batch, "train_learning_rate": LEARNING_RATE,
        "mixed_precision": "no", "allow_tf32": False, "save_freq": NEVER, "log_with": None, "num_epochs": NEVER,
    }  # fmt: skip
    if task.method == "ddpo":
        sampled = {"sample_batch_size": task.batch, "sample_num_batches_per_epoch": task.batches, "train_gradient_accumulation_steps": 1}
        return DDPOTrainer(DDPOConfig(**common, **sampled), brightness, prompt, pipeline)
    cut = {"truncated_backprop_rand": False, "truncated_backprop_timestep": task.steps - task.grad_steps, "sample_eta": 1.0}
    config = AlignPropConfig(**common, **cut, train_gradient_accumulation_steps=task.batches)
    return AlignPropTrainer(config, brightness, prompt, pipeline)


def train(worker, task: Task, path) -> None:
    torch.manual_seed(0)
    made, step = trainer(task), 0
    for epoch in worker.epochs():
        step = made.step(epoch, step)
