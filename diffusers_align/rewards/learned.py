r"""A reward that was learned from preferences: a small head on the embeddings of a CLIP model, which is frozen or carries a LoRA.

The head sees the unit embeddings of image and prompt and their elementwise product, whose sum is CLIPScore, each on a scale of about 1 a
dimension. Its output is a logit: a difference of two is the log-odds of being preferred, as in the Bradley-Terry model
(https://arxiv.org/abs/1706.03741, section 2.2.3), or it is on the scale of the scores that it was fitted to.

A step-aware reward also gets the noise level in [0, 1] of the sample that the image is a prediction from, 0 for a finished image: the preference
model of SPO (https://arxiv.org/abs/2406.04314). As there, the level scales and shifts what is judged (adaptive normalisation): there within the
vision model's layers, here before the head.

`train_reward.py` writes a folder of `learned_reward.json`, `head.safetensors` and, with a LoRA, `lora.safetensors`; its path is the reward's
name: `--reward PATH`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import weight_files
from .clip_embedder import CLIPEmbedder
from .preprocessing import flatten_frames, mean_over_frames, repeat_for_frames
from .registry import load_weights, shown

FILES = CONFIG, WEIGHTS, LORA = "learned_reward.json", "head.safetensors", "lora.safetensors"
# The vision tower's attention, in transformers' naming.
LORA_TARGETS = r".*vision_model.*\.(q_proj|k_proj|v_proj|out_proj)"
FREQUENCIES = 16


class Head(nn.Module):
    """(N, 3 * width) features to (N,) logits: linear for hidden = 0, else with a hidden layer of so many units.

    Args:
        step_aware: the noise level scales and shifts the features, not at all at first.
    """

    def __init__(self, width: int, hidden: int = 0, step_aware: bool = False):
        super().__init__()
        layers = [nn.Linear(3 * width, hidden), nn.GELU(), nn.Dropout(0.1)] if hidden else []
        self.layers = nn.Sequential(*layers, nn.Linear(hidden or 3 * width, 1))
        self.level = nn.Sequential(nn.Linear(2 * FREQUENCIES, 64), nn.SiLU(), nn.Linear(64, 6 * width)) if step_aware else None
        if step_aware:
            nn.init.zeros_(self.level[-1].weight)
            nn.init.zeros_(self.level[-1].bias)

    def forward(self, features: Tensor, noise_level: Tensor | None = None) -> Tensor:
        """features: (N, 3 * width); noise_level: (N,), 0 if absent."""
        if self.level is not None:
            levels = torch.zeros(len(features)) if noise_level is None else noise_level
            scale, shift = self.level(waves(levels.to(features))).chunk(2, -1)
            features = features * (1 + scale) + shift
        return self.layers(features).squeeze(-1)


def waves(noise_level: Tensor) -> Tensor:
    """(N,) in [0, 1] to (N, 2 * FREQUENCIES): sines and cosines of half a turn to 16 turns, evenly spaced in their logarithms."""
    rates = torch.logspace(math.log2(math.pi), math.log2(32 * math.pi), FREQUENCIES, base=2.0, device=noise_level.device)
    angles = noise_level[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], -1)


class RewardModel(nn.Module):
    """A CLIP model with a head, and what says how both are made.

    Args:
        model: of CLIP: Hub name, folder, or embedded name.
        hidden, step_aware: of the head.
        rank: of a LoRA on the vision tower's attention, as wide as it (alpha = rank); 0 for none.
    """

    def __init__(self, model: str, hidden: int = 0, rank: int = 0, step_aware: bool = False):
        super().__init__()
        self.settings = {"model": model, "hidden": hidden, "rank": rank, "step_aware": step_aware}
        self.clip = load_clip(model)
        if rank:
            from peft import LoraConfig, inject_adapter_in_model

            inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_TARGETS), self.clip.model)
        self.head = Head(self.clip.model.config.projection_dim, hidden, step_aware)

    def forward(self, images: Tensor, texts: Tensor, noise_level: Tensor | None = None) -> Tensor:
        """Logits (N,) of unit embeddings (N, D) of images and of their prompts."""
        return self.head(features(images, texts), noise_level)

    def lora(self) -> dict[str, Tensor]:
        """The LoRA's tensors by name; {} without one."""
        return {name: value for name, value in self.clip.model.state_dict().items() if "lora_" in name}

    def save(self, folder: str | Path, scale: float = 1.0, shift: float = 0.0, **about: Any) -> None:
        """Write a folder that `LearnedReward` reads.

        Args:
            scale, shift: the reward is the head's output times `scale` plus `shift`.
            about: whatever else is worth knowing of it, JSON.
        """

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for file, tensors in ((WEIGHTS, self.head.state_dict()), (LORA, self.lora())):
            (folder / file).unlink(missing_ok=True)
            if tensors:
                weight_files.save(tensors, folder / file)
        (folder / CONFIG).write_text(json.dumps({**self.settings, "scale": scale, "shift": shift, **about}, indent=1) + "\n")


class LearnedReward(nn.Module):
    """What `RewardModel.save` wrote; of a video, the mean over frames. Differentiable by the images.

    Raises:
        FileNotFoundError: the folder lacks one of its files.
        ValueError: a file's weights are not this model's.
    """

    def __init__(self, folder: str | Path):
        from safetensors.torch import load_file

        super().__init__()
        folder = Path(folder)
        _check_there(folder, CONFIG, WEIGHTS)
        self.config = json.loads((folder / CONFIG).read_text())
        self.name = folder.resolve().name
        self.model = RewardModel(**{name: self.config[name] for name in ("model", "hidden", "rank", "step_aware")})
        load_weights(self.model.head, load_file(folder / WEIGHTS), folder / WEIGHTS)
        if self.config["rank"]:
            _check_there(folder, LORA)
            lora, wanted = load_file(folder / LORA), self.model.lora()
            if lora.keys() != wanted.keys():
                raise ValueError(f"{folder / LORA} is no LoRA of this model: {shown(sorted(lora.keys() ^ wanted.keys()))} are in only one of them.")
            self.model.clip.model.load_state_dict(lora, strict=False)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor, prompts: list[str], noise_level: list[float] | None = None, **columns: Any) -> Tensor:
        """images: (B, 3, H, W) or (B, F, 3, H, W) in [0, 1]; noise_level: for step-aware ones, B of them in [0, 1]. Returns (B,)."""
        clip = self.model.clip
        texts = repeat_for_frames(clip.texts(prompts), images)
        levels = None if noise_level is None else repeat_for_frames(torch.tensor(noise_level, dtype=torch.float32, device=texts.device), images)
        values = self.model(clip.images(flatten_frames(images)), texts, levels)
        return mean_over_frames(values * self.config["scale"] + self.config["shift"], images).to(images.device)


def _check_there(folder: Path, *files: str) -> None:
    for file in files:
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} is no learned reward: it lacks {file}. Name the --output_dir of train_reward.py.")


def load_clip(model: str) -> CLIPEmbedder:
    """A CLIP model by Hub name, folder, or embedded name."""
    from .. import embedded

    return CLIPEmbedder(embedded.path(model) if model in embedded.NAMES else model)


def features(images: Tensor, texts: Tensor) -> Tensor:
    """(N, 3 D) of unit embeddings (N, D) of images and of their prompts."""
    width = images.shape[-1]
    return torch.cat([images * width**0.5, texts * width**0.5, images * texts * width], -1)
