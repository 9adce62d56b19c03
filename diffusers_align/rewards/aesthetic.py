"""LAION's aesthetic predictor: linear layers on CLIP ViT-L/14's unit image embeddings, trained on human ratings from 1 to 10.

https://github.com/christophschuhmann/improved-aesthetic-predictor, the weights `sac+logos+ava1-l14-linearMSE.pth`: the
aesthetic reward of DDPO (https://arxiv.org/abs/2305.13301) and of most that followed. The prompt plays no part. Compared with the scorer of
kvablack/ddpo-pytorch, 1958463, with its published head: equal up to the rounding of its 8-bit images. Its loader is strict, as this one.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from .clip_embedder import CLIPEmbedder
from .preprocessing import flatten_frames, mean_over_frames
from .registry import checkpoint_file, load_weights


class AestheticMLP(nn.Module):
    """The head: five linear layers, dropout between them in training, and (as published) no activation. (N, 768) to (N,)."""

    def __init__(self, width: int = 768):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64), nn.Dropout(0.1),
            nn.Linear(64, 16), nn.Linear(16, 1),
        )  # fmt: skip

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.layers(embeddings).squeeze(-1)


class AestheticScore(nn.Module):
    """Predicted rating, about 1 to 10 (4 to 7 for most images); of a video, the mean over frames. Differentiable.

    Args:
        model: the CLIP that the head was trained on, by Hub name or folder.
        checkpoint: the head's weights: a local file, or the Hub repository that holds `filename`.
        filename: the default pair is the Hub copy of `sac+logos+ava1-l14-linearMSE.pth` that TRL made for its DDPO trainer.
    """

    name = "aesthetic"

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        checkpoint: str | os.PathLike = "trl-lib/ddpo-aesthetic-predictor",
        filename: str = "aesthetic-model.pth",
    ):
        super().__init__()
        self.clip = CLIPEmbedder(model)
        state = load_head(checkpoint, filename)
        width = state["layers.0.weight"].shape[1]
        if width != self.clip.model.config.projection_dim:
            raise ValueError(
                f"The aesthetic head {checkpoint} is made for embeddings of size {width}, {model} has {self.clip.model.config.projection_dim}: "
                "use the CLIP that it was trained on."
            )
        self.head = AestheticMLP(width)
        load_weights(self.head, state, checkpoint)
        self.float().eval().requires_grad_(False)

    def forward(self, images: Tensor, prompts: list[str] | None = None, **columns: Any) -> Tensor:
        """images: (B, 3, H, W) or (B, F, 3, H, W) in [0, 1]. Returns (B,) ratings."""
        return mean_over_frames(self.head(self.clip.images(flatten_frames(images))), images).to(images.device)


def load_head(checkpoint: str | os.PathLike, filename: str) -> dict[str, Tensor]:
    """The head's state dict (keys `layers.N.weight`, `layers.N.bias`) from a local file or a Hub repository.

    Raises:
        ValueError: the file holds something else.
    """
    checkpoint = checkpoint_file(checkpoint, filename)
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or "layers.0.weight" not in state:
        raise ValueError(f"{checkpoint} is no checkpoint of the improved aesthetic predictor: it lacks 'layers.0.weight'.")
    return state
