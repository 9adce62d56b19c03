"""examples/research_projects/diffusion_dpo/train_diffusion_dpo.py of a checkout of diffusers, its text run with one replacement: its loop over epochs.

wandb is a stub, and so are the few transforms of torchvision where that is not installed. The data set is the task's pairs, in the script's own columns.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import datasets
import numpy
import torch
from PIL import Image

from benchmarks.peers.tasks import LEARNING_RATE, PIXELS, RANK, Task
from benchmarks.peers.worker import replaced


def rows() -> datasets.Dataset:
    """The pairs of the task: bytes of two pictures, the first of which is preferred."""
    read = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]
    made = [{"jpg_0": Path(r["chosen"]).read_bytes(), "jpg_1": Path(r["rejected"]).read_bytes(), "label_0": 1, "caption": r["prompt"]} for r in read]
    return datasets.Dataset.from_list(made)


def _flip() -> Callable:
    return lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if torch.rand(()) < 0.5 else image


def _to_tensor() -> Callable:
    return lambda image: torch.from_numpy(numpy.array(image)).permute(2, 0, 1).contiguous().float().div(255)


def _composed(steps: list) -> Callable:
    def run(image):
        for step in steps:
            image = step(image)
        return image

    return run


def stub_torchvision() -> None:
    """The transforms that the script names, for square pictures of the right size."""
    transforms = SimpleNamespace(
        Resize=lambda size, interpolation: lambda image: image.resize((size, size), interpolation) if image.size != (size, size) else image,
        InterpolationMode=SimpleNamespace(BILINEAR=Image.Resampling.BILINEAR),
        CenterCrop=lambda size: lambda image: image,
        RandomHorizontalFlip=_flip,
        ToTensor=_to_tensor,
        Normalize=lambda mean, std: lambda x: (x - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1),
        Lambda=lambda function: function,
        Compose=_composed,
    )
    sys.modules["torchvision"] = ModuleType("torchvision")
    sys.modules["torchvision"].transforms = transforms


def train(worker, task: Task, path: Path) -> None:
    sys.modules["wandb"] = ModuleType("wandb")
    if importlib.util.find_spec("torchvision") is None:
        stub_torchvision()
    datasets.load_dataset = lambda *args, **kwargs: rows()
    text = replaced(path.read_text(), ("for epoch in range(first_epoch, args.num_train_epochs):", "for epoch in EPOCHS:"))
    names = {"__name__": "peer", "EPOCHS": worker.epochs()}
    exec(compile(text, str(path), "exec"), names)
    flags = {
        "pretrained_model_name_or_path": task.model, "dataset_name": "pairs", "output_dir": "diffusers_dpo", "resolution": PIXELS, "rank": RANK,
        "train_batch_size": task.batch, "vae_encode_batch_size": 2 * task.batch, "learning_rate": LEARNING_RATE, "lr_warmup_steps": 0,
        "num_train_epochs": 10**6, "checkpointing_steps": 10**9, "mixed_precision": "no",
    }  # fmt: skip
    args = names["parse_args"]([f"--{name}={value}" for name, value in flags.items()])
    args.report_to = None
    names["main"](args)
