r"""A classifier of noised latents: what will this scene show, judged at any noise level, before the image exists?

Classifier guidance (https://arxiv.org/abs/2105.05233) needs $\log p(y \mid x_t)$, not the verdict of a sharp-eyed judge on a blurred guess.
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from .noisy_trunk import NoisyTrunk
from .scenes import COLORS, COUNTS, OBJECTS, parse

CLASSES = {"object": list(OBJECTS), "color": list(COLORS), "count": list(COUNTS)}


class NoisySceneClassifier(NoisyTrunk):
    """Logits for `object`, `color` and `count` of noised latents (B, 4, 16, 16)."""

    @register_to_config
    def __init__(self, latent_channels: int = 4, latent_size: int = 16, channels: tuple[int, ...] = (48, 80, 112), width: int = 64):
        super().__init__(latent_channels, latent_size, channels, width)
        self.heads = nn.ModuleDict({name: nn.Linear(128, len(classes)) for name, classes in CLASSES.items()})

    def forward(self, latents: Tensor, alpha: Tensor, sigma: Tensor) -> dict[str, Tensor]:
        """latents: (B, 4, 16, 16), alpha x0 + sigma noise with alpha and sigma (B,) > 0. Returns logits (B, classes)."""
        features = self.features(latents, alpha, sigma)
        return {name: head(features) for name, head in self.heads.items()}

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
