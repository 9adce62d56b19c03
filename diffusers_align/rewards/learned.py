r"""A reward that was learned from preferences: a small head on the frozen embeddings of a CLIP model.

The head sees the unit embeddings of image and prompt and their elementwise product, whose sum is CLIPScore, each on a scale of about 1 a
dimension. Its output is a logit: a difference of two is the log-odds of being preferred, as in the Bradley-Terry model
(https://arxiv.org/abs/1706.03741, section 2.2.3), or it is on the scale of the scores that it was fitted to.

`train_reward.py` writes a folder of `learned_reward.json` and `head.safetensors`; its path is the reward's name: `--reward PATH`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .clip_embedder import CLIPEmbedder
from .preprocessing import flatten_frames, mean_over_frames, repeat_for_frames

CONFIG, WEIGHTS = "learned_reward.json", "head.safetensors"


def make_head(width: int, hidden: int) -> nn.Sequential:
    """(N, 3 * width) to (N, 1): linear for hidden = 0, else with a hidden layer of so many units."""
    if hidden == 0:
        return nn.Sequential(nn.Linear(3 * width, 1))
    return nn.Sequential(nn.Linear(3 * width, hidden), nn.GELU(), nn.Dropout(0.1), nn.Linear(hidden, 1))


class LearnedReward(nn.Module):
    """A CLIP model with a head; of a video, the mean over frames. Differentiable by the images.

    Args:
        folder: what `save` wrote.

    Raises:
        FileNotFoundError: the folder lacks one of the two files.
    """

    def __init__(self, folder: str | Path):
        from safetensors.torch import load_file

        super().__init__()
        folder = Path(folder)
        for file in (CONFIG, WEIGHTS):
            if not (folder / file).is_file():
                raise FileNotFoundError(f"{folder} is no learned reward: it lacks {file}. Name the --output_dir of train_reward.py.")
        self.config = json.loads((folder / CONFIG).read_text())
        self.name = folder.resolve().name
        self.clip = load_clip(self.config["model"])
        self.head = make_head(self.clip.model.config.projection_dim, self.config["hidden"])
        self.head.load_state_dict(load_file(folder / WEIGHTS))
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor, prompts: list[str], **columns: Any) -> Tensor:
        """images: (B, 3, H, W) or (B, F, 3, H, W) in [0, 1]. Returns (B,)."""
        texts = repeat_for_frames(self.clip.texts(prompts), images)
        values = self.head(features(self.clip.images(flatten_frames(images)), texts)).squeeze(-1)
        return mean_over_frames(values * self.config["scale"] + self.config["shift"], images).to(images.device)


def load_clip(model: str) -> CLIPEmbedder:
    """A CLIP model by Hub name, folder, or embedded name."""
    from .. import embedded

    return CLIPEmbedder(embedded.path(model) if model in embedded.NAMES else model)


def features(images: Tensor, texts: Tensor) -> Tensor:
    """(N, 3 D) of unit embeddings (N, D) of images and of their prompts."""
    width = images.shape[-1]
    return torch.cat([images * width**0.5, texts * width**0.5, images * texts * width], -1)


def save(folder: str | Path, head: nn.Module, model: str, hidden: int, scale: float = 1.0, shift: float = 0.0, **about: Any) -> None:
    """Write a folder that `LearnedReward` reads.

    Args:
        scale, shift: the reward is the head's output times `scale` plus `shift`.
        about: whatever else is worth knowing of it, JSON.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    from safetensors.torch import save_file

    save_file({name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()}, folder / WEIGHTS)
    config = {"model": model, "hidden": hidden, "scale": scale, "shift": shift, **about}
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
