r"""What the noise-aware judges share: a network that reads noised latents at any noise level.

One network serves both embedded pipelines, which share their autoencoder: a state $x_t = \alpha x_0 + \sigma\epsilon$ is scaled to
$\alpha^2 + \sigma^2 = 1$, and the noise level enters as $\log(\sigma / \alpha)$. Diffusion, flow matching and variance-exploding
states are then one.
"""

from __future__ import annotations

import math

import torch
from diffusers import ConfigMixin, ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F


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


class NoisyTrunk(ModelMixin, ConfigMixin):
    """Features (B, 128) of noised latents (B, 4, 16, 16); a subclass adds what it reads from them."""

    def __init__(self, latent_channels: int, latent_size: int, channels: tuple[int, ...], width: int):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(32, width), nn.SiLU())
        self.stem = nn.Conv2d(latent_channels, channels[0], 3, padding=1)
        self.blocks = nn.ModuleList(ModulatedBlock(c, width) for c in channels)
        self.downs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip(channels, channels[1:]))
        side = latent_size // 2 ** (len(channels) - 1)
        self.norm, self.squeeze = nn.GroupNorm(8, channels[-1]), nn.Conv2d(channels[-1], 12, 1)
        self.hidden = nn.Linear(channels[-1] + 12 * side * side, 128)

    def features(self, latents: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """latents: (B, 4, 16, 16), alpha x0 + sigma noise with alpha and sigma (B,) > 0. Returns (B, 128)."""
        level = self.embed(_waves((sigma / alpha).log().clamp(-6, 6)))
        h = self.stem(latents / (alpha.square() + sigma.square()).sqrt()[:, None, None, None])
        for i, block in enumerate(self.blocks):
            h = block(h if i == 0 else self.downs[i - 1](h), level)
        h = F.silu(self.norm(h))
        return F.silu(self.hidden(torch.cat([h.mean((2, 3)), self.squeeze(h).flatten(1)], 1)))


def _waves(level: Tensor) -> Tensor:
    """(B,) log noise levels as (B, 32) sines and cosines of periods from 24 down to 0.8."""
    frequencies = 2 * math.pi / 24 * 30 ** torch.linspace(0, 1, 16, device=level.device, dtype=level.dtype)
    angles = level[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)
