"""scripts/train.py of a checkout of kvablack/ddpo-pytorch, its text run with few replacements.

Its packages for flags and logging are stubs, prompts and reward those of the task. Its `LoRAAttnProcessor` left diffusers: a LoRA of peft of the same
rank at the same layers, as TRL has it.
"""

from __future__ import annotations

import random
import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import diffusers.utils
from diffusers.utils.torch_utils import randn_tensor
from peft import LoraConfig

from benchmarks.peers.tasks import LAYERS, LEARNING_RATE, PROMPTS, RANK, Task
from benchmarks.peers.worker import replaced


def module(name: str, **contents) -> ModuleType:
    """A module of these contents, importable from now on."""
    made = sys.modules[name] = ModuleType(name)
    made.__dict__.update(contents)
    return made


class Config(SimpleNamespace):
    """Of `ml_collections.ConfigDict` what the script uses."""

    def to_dict(self) -> dict:
        return dict(vars(self))


def configured(path: Path, task: Task) -> Config:
    """The checkout's own defaults with the task's sizes."""
    config = runpy.run_path(str(path / "config" / "base.py"))["get_config"]()
    config.mixed_precision, config.save_freq, config.num_epochs, config.allow_tf32 = "no", 10**9, 1, False
    config.pretrained.model, config.pretrained.revision = task.model, None
    config.prompt_fn, config.prompt_fn_kwargs, config.reward_fn = "of_task", {}, "brightness"
    sample, trained = config.sample, config.train
    sample.num_steps, sample.guidance_scale, sample.batch_size, sample.num_batches_per_epoch = task.steps, task.guidance, task.batch, task.batches
    trained.batch_size, trained.gradient_accumulation_steps, trained.learning_rate = task.batch, 1, LEARNING_RATE
    return config


def between(text: str, first: str, last: str, new: str) -> str:
    """The text with what lies between two marks, and the marks, exchanged."""
    return replaced(text, (text[text.index(first) : text.index(last) + len(last)], new))


def train(worker, task: Task, path: Path) -> None:
    sys.path.insert(0, str(path))
    flags = module("absl.flags", FLAGS=SimpleNamespace())
    module("absl", flags=flags, app=None)
    config_flags = SimpleNamespace(DEFINE_config_file=lambda *args: None)
    module("ml_collections", ConfigDict=Config, config_flags=config_flags)
    module("wandb", Image=lambda *args, **kwargs: None)
    import ddpo_pytorch

    def brightness(images, prompts, metadata):
        return images.flatten(1).mean(1), {}

    ddpo_pytorch.prompts = module("ddpo_pytorch.prompts", of_task=lambda: (random.choice(PROMPTS), {}))
    ddpo_pytorch.rewards = module("ddpo_pytorch.rewards", brightness=lambda: brightness)
    diffusers.utils.randn_tensor = randn_tensor  # it moved
    text = replaced(
        (path / "scripts" / "train.py").read_text(),
        ("from diffusers.models.attention_processor import LoRAAttnProcessor\n", ""),
        ('log_with="wandb"', "log_with=None"),
        ("for epoch in range(first_epoch, config.num_epochs):", "for epoch in EPOCHS:"),
    )
    lora = "pipeline.unet.add_adapter(LORA)\n        unet = pipeline.unet"
    text = between(text, "lora_attn_procs = {}\n", "unet = _Wrapper(pipeline.unet.attn_processors)", lora)
    flags.FLAGS.config = configured(path, task)
    names = {"__name__": "peer", "EPOCHS": worker.epochs(), "LORA": LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LAYERS)}
    exec(compile(text, str(path / "scripts" / "train.py"), "exec"), names)
    names["main"](None)
