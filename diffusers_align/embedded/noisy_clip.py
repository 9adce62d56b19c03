r"""A CLIP that looks at noised latents, as GLIDE's (https://arxiv.org/abs/2112.10741, section 2.4): how well does what this state is
becoming fit the caption?

CLIP guidance follows the gradient of $s(x_t, c) = \tau \langle f(x_t), g(c) \rangle$, f and g of unit length and $\tau$ the learnt inverse
temperature (`exp(logit_scale)` in the official code). GLIDE trains both towers; here g is the text tower of `mini-clip`, frozen, so that
the image tower alone is trained, stored, and comparable with mini-clip's own.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

from .noisy_trunk import NoisyTrunk

# log(sigma / alpha) below which 98% of the noise levels of the training lie. Beyond, where a diffusion sampler starts, the embedding is not
# learnt, and its gradient, which sigma^2 / alpha magnifies most there, would throw samples off.
MAX_LEVEL = 2.5


class NoisyCLIP(NoisyTrunk):
    """The image tower: embeddings of noised latents (B, 4, 16, 16) in the space of a CLIP's text embeddings."""

    @register_to_config
    def __init__(self, latent_channels: int = 4, latent_size: int = 16, channels: tuple[int, ...] = (48, 80, 112), width: int = 64, projection_dim: int = 64):
        super().__init__(latent_channels, latent_size, channels, width)
        self.projection = nn.Linear(128, projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, latents: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """latents: (B, 4, 16, 16), alpha x0 + sigma noise with alpha and sigma (B,) > 0. Returns unit embeddings (B, 64)."""
        return F.normalize(self.projection(self.features(latents, alpha, sigma)), dim=-1)


class NoisyCLIPScore(nn.Module):
    """A noise-aware reward for `RewardGuidedPipeline(..., preset="glide_clip")`: both towers.

    Args:
        image_tower: a folder of `NoisyCLIP`, or one; the shipped one by default.
        text_tower: a folder of `CLIPModel` with its tokenizer; mini-clip by default.
    """

    def __init__(self, image_tower: str | NoisyCLIP | None = None, text_tower: str | None = None):
        super().__init__()
        folder = Path(__file__).parent
        image_tower = image_tower or str(folder / "noisy-clip")
        self.image_tower = image_tower if isinstance(image_tower, NoisyCLIP) else NoisyCLIP.from_pretrained(image_tower)
        self.text_tower = TextTower(text_tower or str(folder / "mini-clip"))
        self.float().eval().requires_grad_(False)

    def forward(self, latents: Tensor, prompts: list[str], alpha: Tensor, sigma: Tensor) -> Tensor:
        """tau <f(x_t), g(prompt)>, (B,), differentiable in the latents (B, 4, 16, 16); 0 for states noisier than `MAX_LEVEL`, without gradient."""
        cosine = (self.image_tower(latents, alpha, sigma) * self.text_tower(prompts).to(latents.device)).sum(-1)
        return self.image_tower.logit_scale.exp() * cosine * ((sigma / alpha).log() <= MAX_LEVEL)


class TextTower(nn.Module):
    """The text half of a `CLIPModel`, frozen."""

    def __init__(self, folder: str | Path):
        super().__init__()
        clip = CLIPModel.from_pretrained(folder)
        self.model, self.projection, self.tokenizer = clip.text_model, clip.text_projection, CLIPTokenizer.from_pretrained(folder)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, captions: list[str]) -> Tensor:
        """Unit embeddings (B, 64)."""
        length = self.model.config.max_position_embeddings
        tokens = self.tokenizer(list(captions), padding=True, truncation=True, max_length=length, return_tensors="pt").to(self.projection.weight.device)
        return F.normalize(self.projection(self.model(**tokens).pooler_output), dim=-1)
