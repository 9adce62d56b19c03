"""CLIPScore (https://arxiv.org/abs/2104.08718): how well an image fits its prompt by CLIP's embeddings.

The plain cosine in [-1, 1], typically 0.1 to 0.4: neither cut at 0 nor multiplied (the paper has 2.5 max(cos, 0), other
libraries 100 cos), because a factor is the learning rate's business and a cut has no gradient.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .clip_embedder import CLIPEmbedder
from .preprocessing import flatten_frames, mean_over_frames, repeat_for_frames


class CLIPScore(nn.Module):
    """Cosine of the image's and the prompt's CLIP embedding; of a video, the mean over frames. Differentiable.

    Args:
        model: a checkpoint of `transformers.CLIPModel`, by Hub name or folder, e.g. `diffusers_align.embedded.path("mini-clip")`.
        processor: where image settings and tokenizer are, if not with the model.
    """

    name = "clip_score"

    def __init__(self, model: str = "openai/clip-vit-large-patch14", processor: str | None = None):
        super().__init__()
        self.clip = CLIPEmbedder(model, processor)
        self.eval()

    def forward(self, images: Tensor, prompts: list[str], **columns: Any) -> Tensor:
        """images: (B, 3, H, W) or (B, F, 3, H, W) in [0, 1]. Returns (B,) cosines."""
        texts = repeat_for_frames(self.clip.texts(prompts), images)
        cosine = (self.clip.images(flatten_frames(images)) * texts).sum(-1)
        return mean_over_frames(cosine, images).to(images.device)
