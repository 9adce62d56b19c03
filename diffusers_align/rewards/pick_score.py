"""PickScore (https://arxiv.org/abs/2305.01569): CLIP ViT-H/14 fine-tuned on the choices of Pick-a-Pic's users.

The model's logit is exp(logit_scale) cos(image, prompt), about 17 to 26; a difference of logits is the log-odds of being
preferred. As in https://github.com/yifan123/flow_grpo it is divided by 26, which puts it near [0, 1]; `raw=True` leaves it. Compared with
that scorer at ac4c86e on a small CLIP (transformers 4.44 there): equal up to the rounding of its 8-bit images.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .clip_embedder import CLIPEmbedder
from .preprocessing import flatten_frames, mean_over_frames, repeat_for_frames

MODEL = "yuvalkirstain/PickScore_v1"
PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
SCALE = 26.0


class PickScore(nn.Module):
    """PickScore / 26, of a video the mean over frames. Differentiable.

    Args:
        model: a Hub name or a folder.
        processor: where image settings and tokenizer are: by default PickScore's for its own Hub name, else with the model.
        raw: the logit itself, not divided by 26.
    """

    name = "pick_score"

    def __init__(self, model: str = MODEL, processor: str | None = None, raw: bool = False):
        super().__init__()
        self.clip = CLIPEmbedder(model, processor or (PROCESSOR if model == MODEL else None))
        self.raw = raw
        self.eval()

    def forward(self, images: Tensor, prompts: list[str], **columns: Any) -> Tensor:
        """images: (B, 3, H, W) or (B, F, 3, H, W) in [0, 1]. Returns (B,) scores."""
        texts = repeat_for_frames(self.clip.texts(prompts), images)
        logits = self.clip.model.logit_scale.exp() * (self.clip.images(flatten_frames(images)) * texts).sum(-1)
        return mean_over_frames(logits if self.raw else logits / SCALE, images).to(images.device)
