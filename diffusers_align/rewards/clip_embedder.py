"""CLIP (https://arxiv.org/abs/2103.00020) as the rewards use it: frozen, float32, unit embeddings, gradients to the pixels."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .preprocessing import Letterbox, Preprocessing
from .registry import shown


class CLIPEmbedder(nn.Module):
    """A `transformers.CLIPModel` with its preprocessing and its tokenizer.

    Args:
        model: a Hub name or a folder, or a `CLIPModel`.
        processor: where image settings and tokenizer are, if not with the model.
        preprocess: the image settings, if not the processor's.

    Raises:
        FileNotFoundError: there is no such folder, and the Hub does not give it.
    """

    def __init__(self, model: Any, processor: str | None = None, preprocess: Preprocessing | Letterbox | None = None):
        from transformers import AutoTokenizer, CLIPModel

        from ..checks.given_names import fetched

        super().__init__()
        with fetched(str(model), "CLIP model"):
            self.model = (model if isinstance(model, CLIPModel) else pretrained_clip(model)).float()
        with fetched(str(processor or model), "processor of CLIP"):
            self.preprocess = preprocess or Preprocessing.from_pretrained(processor or model)
            self.tokenizer = AutoTokenizer.from_pretrained(processor or model)
        self.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def images(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] to unit embeddings (N, D)."""
        return F.normalize(pooled(self.model.get_image_features(pixel_values=self.preprocess(images.to(self.device)))), dim=-1)

    @torch.no_grad()
    def texts(self, prompts: list[str]) -> Tensor:
        """B prompts, cut to the model's length, to unit embeddings (B, D)."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(prompts), padding=True, truncation=True, max_length=length, return_tensors="pt").to(self.device)
        return F.normalize(pooled(self.model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)), dim=-1)


def pretrained_clip(name: str):
    """A `CLIPModel` of which no weight is random.

    Raises:
        ValueError: the checkpoint lacks some, which transformers would draw and only log; or a folder holds none.
    """
    from transformers import CLIPModel

    try:
        model, found = CLIPModel.from_pretrained(name, output_loading_info=True)
    except OSError as error:
        if not os.path.isdir(os.path.expanduser(name)):
            raise
        raise ValueError(f"{name} holds no CLIP model ({str(error).splitlines()[0]}): give the folder or the Hub name of one, or mini-clip.") from error
    missing = sorted(found["missing_keys"]) + sorted(str(entry) for entry in found["mismatched_keys"])
    if missing:
        raise ValueError(f"{name} is no checkpoint of CLIPModel: it lacks {shown(missing)}, which would be random numbers.")
    return model


def pooled(features: Any) -> Tensor:
    """What `get_image_features` means: a tensor in transformers 4, the `pooler_output` of an object in transformers 5."""
    return features if isinstance(features, Tensor) else features.pooler_output
