"""A second network that tells what a scene shows, for what took no part in a training: a small vision transformer.

`SceneClassifier` is convolutional and stands behind the reward `scene_score`; samples may be tuned to its errors. This one has another
architecture, other first weights and saw other scenes. It answers the same questions in the same form.
"""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from .scenes import COLORS, COUNTS, OBJECTS


class SceneJudge(ModelMixin, ConfigMixin):
    """Logits for `object`, `color` and `count`, and the mean centre (x, y) of the objects in [0, 1]."""

    @register_to_config
    def __init__(self, image_size: int = 32, width: int = 96, depth: int = 4, attention_heads: int = 4):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width // 2, 3, stride=2, padding=1), nn.GELU(), nn.Conv2d(width // 2, width, 3, stride=2, padding=1)
        )  # fmt: skip
        self.positions = nn.Parameter(0.02 * torch.randn(1, (image_size // 4) ** 2, width))
        layer = lambda: nn.TransformerEncoderLayer(width, attention_heads, 3 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)  # noqa: E731
        self.blocks = nn.ModuleList([layer() for _ in range(depth)])
        self.norm = nn.LayerNorm(2 * width)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(2 * width, number) for name, number in {"object": len(OBJECTS), "color": len(COLORS), "count": len(COUNTS), "center": 2}.items()}
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """images: (B, 3, H, W) in [0, 1], resized to the training size if need be. Returns logits (B, classes) and `center` (B, 2)."""
        size = self.config.image_size
        if images.shape[-2:] != (size, size):
            images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
        tokens = self.stem(images * 2 - 1).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            tokens = block(tokens)
        hidden = self.norm(torch.cat([tokens.mean(1), tokens.amax(1)], 1))
        out = {name: head(hidden) for name, head in self.heads.items()}
        out["center"] = out["center"].sigmoid()
        return out
