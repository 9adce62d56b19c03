r"""A classifier of noised latents: what will this scene show, judged at any noise level, before the image exists?

Classifier guidance (https://arxiv.org/abs/2105.05233) needs $\log p(y \mid x_t)$, not the verdict of a sharp-eyed judge on a blurred
guess. One network serves both embedded pipelines, which share their autoencoder: a state $x_t = \alpha x_0 + \sigma\epsilon$ is scaled
to $\alpha^2 + \sigma^2 = 1$, and the noise level enters as $\log(\sigma / \alpha)$. Diffusion, flow matching and variance-exploding
states are then one.
"""

from __future__ import annotations

import math

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from .scenes import COLORS, COUNTS, OBJECTS, parse

CLASSES = {"object": list(OBJECTS), "color": list(COLORS), "count": list(COUNTS)}


class ModulatedBlock(nn.Module):
    """Two normalised convolutions beside the identity, the second scaled and shifted by the noise level."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.level = nn.Linear(width, 2 * channels)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        scale, shift = self.level(level)[..., None, None].chunk(2, 1)
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))


class NoisySceneClassifier(ModelMixin, ConfigMixin):
    """Logits for `object`, `color` and `count` of noised latents (B, 4, 16, 16)."""

    @register_to_config
    def __init__(self, latent_channels: int = 4, latent_size: int = 16, channels: tuple[int, ...] = (48, 80, 112), width: int = 64):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(32, width), nn.SiLU())
        self.stem = nn.Conv2d(latent_channels, channels[0], 3, padding=1)
        self.blocks = nn.ModuleList(ModulatedBlock(c, width) for c in channels)
        self.downs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip(channels, channels[1:]))
        side = latent_size // 2 ** (len(channels) - 1)
        self.norm, self.squeeze = nn.GroupNorm(8, channels[-1]), nn.Conv2d(channels[-1], 12, 1)
        self.hidden = nn.Linear(channels[-1] + 12 * side * side, 128)
        self.heads = nn.ModuleDict({name: nn.Linear(128, len(classes)) for name, classes in CLASSES.items()})

    def forward(self, latents: Tensor, alpha: Tensor, sigma: Tensor) -> dict[str, Tensor]:
        """latents: (B, 4, 16, 16), alpha x0 + sigma noise with alpha and sigma (B,) > 0. Returns logits (B, classes)."""
        level = self.embed(_waves((sigma / alpha).log().clamp(-6, 6)))
        h = self.stem(latents / (alpha.square() + sigma.square()).sqrt()[:, None, None, None])
        for i, block in enumerate(self.blocks):
            h = block(h if i == 0 else self.downs[i - 1](h), level)
        h = F.silu(self.norm(h))
        hidden = F.silu(self.hidden(torch.cat([h.mean((2, 3)), self.squeeze(h).flatten(1)], 1)))
        return {name: head(hidden) for name, head in self.heads.items()}

    def log_prob(self, latents: Tensor, captions: list[str], alpha: Tensor, sigma: Tensor, attributes: tuple[str, ...] = tuple(CLASSES)) -> Tensor:
        """log p(what the captions name | x_t), (B,): the sum over those of `attributes` that each caption names.

        Raises:
            ValueError: a caption names none of them.
        """
        asked = [{name: value for name, value in parse(caption).items() if name in attributes} for caption in captions]
        if not all(asked):
            raise ValueError(f"{captions[asked.index({})]!r} names none of {', '.join(attributes)}; see `embedded.scenes`.")
        found = {name: logits.log_softmax(-1) for name, logits in self(latents, alpha, sigma).items()}
        rows = [sum(found[name][i, CLASSES[name].index(value)] for name, value in wanted.items()) for i, wanted in enumerate(asked)]
        return torch.stack(rows)


def _waves(level: Tensor) -> Tensor:
    """(B,) log noise levels as (B, 32) sines and cosines of periods from 24 down to 0.8."""
    frequencies = 2 * math.pi / 24 * 30 ** torch.linspace(0, 1, 16, device=level.device, dtype=level.dtype)
    angles = level[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)
