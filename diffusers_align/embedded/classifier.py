"""A small convolutional network that tells what a scene shows: object, background colour, count and the objects' centre.

It stands behind the reward `scene_score` the way a detector stands behind GenEval (https://arxiv.org/abs/2310.11513).
"""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from .scenes import COLORS, COUNTS, OBJECTS


class ResidualBlock(nn.Module):
    """Two normalised convolutions beside the identity."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, channels), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class SceneClassifier(ModelMixin, ConfigMixin):
    """Logits for `object`, `color` and `count`, and the mean centre (x, y) of the objects in [0, 1]."""

    @register_to_config
    def __init__(self, image_size: int = 32, channels: tuple[int, ...] = (48, 96, 128)):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, channels[0], 4, stride=2, padding=1), ResidualBlock(channels[0])]
        for width, wider in zip(channels, channels[1:]):
            layers += [nn.Conv2d(width, wider, 3, stride=2, padding=1), ResidualBlock(wider)]
        side = image_size // 2 ** len(channels)
        self.trunk = nn.Sequential(*layers, nn.GroupNorm(8, channels[-1]), nn.SiLU())
        self.squeeze = nn.Conv2d(channels[-1], 16, 1)
        self.hidden = nn.Linear(channels[-1] * 2 + 16 * side * side, 192)
        self.heads = nn.ModuleDict(
            {"object": nn.Linear(192, len(OBJECTS)), "color": nn.Linear(192, len(COLORS)), "count": nn.Linear(192, len(COUNTS)), "center": nn.Linear(192, 2)}
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """images: (B, 3, H, W) in [0, 1], resized to the training size if need be. Returns logits (B, classes) and `center` (B, 2)."""
        size = self.config.image_size
        if images.shape[-2:] != (size, size):
            images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
        h = self.trunk(images * 2 - 1)
        pooled = torch.cat([h.mean((2, 3)), h.amax((2, 3)), self.squeeze(h).flatten(1)], 1)
        hidden = F.silu(self.hidden(pooled))
        out = {name: head(hidden) for name, head in self.heads.items()}
        out["center"] = out["center"].sigmoid()
        return out
