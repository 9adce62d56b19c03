"""ImageReward (https://arxiv.org/abs/2304.05977): BLIP-large fine-tuned on 137 thousand rankings that people made of generated images.

The image goes through BLIP's ViT, the prompt through BLIP's text encoder, whose layers attend to the image; the encoder's first
token goes through five linear layers. The result is standardised by mean 0.1672 and std 1.0333, so that scores lie within about
-2 to 2. Everything is built from transformers' own BLIP classes, of the sizes that the checkpoint has.

Compared with the package image-reward 1.5 (`ImageReward.score`) at full size on random weights: model and tokens are equal, pixels up to the
rounding of its 8-bit images (scores to 2e-3 of a spread of 0.25). Published scores of the released checkpoint were not compared. Its loader is not strict;
here, too, weights that the score does not need are left out (and named), but a missing one, random numbers there, is an error.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .aesthetic import AestheticMLP
from .preprocessing import Preprocessing, flatten_frames, mean_over_frames, repeat_for_frames
from .registry import checkpoint_file, load_weights, say_left_out

MEAN, STD = 0.16717362830052426, 1.0333394966054072
MAX_TOKENS = 35
HEAD_WIDTH = 64  # of BLIP's attention heads, in both encoders
TOKENIZER = "google-bert/bert-base-uncased"

# Official name -> transformers' name, by parts; the text encoder's names agree.
VISION_NAMES = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.": "embeddings.patch_embedding.",
    "blocks.": "encoder.layers.",
    ".attn.qkv.": ".self_attn.qkv.",
    ".attn.proj.": ".self_attn.projection.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
}
# BLIP's contrastive heads and a buffer: part of the checkpoint, not of the score.
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")


class ImageReward(nn.Module):
    """Standardised human preference; of a video, the mean over frames. Differentiable.

    Args:
        model: the checkpoint: a file, a folder or a Hub repository that holds `filename`.
        tokenizer: of BERT, uncased; taken from the folder `model` if it holds one.
    """

    name = "image_reward"

    def __init__(self, model: str | os.PathLike = "THUDM/ImageReward", filename: str = "ImageReward.pt", tokenizer: str | None = None):
        from transformers import AutoTokenizer, BlipTextModel, BlipVisionModel

        from ..checks.given_names import fetched

        super().__init__()
        file = checkpoint_file(model, filename)
        vision, text, head = split_state(torch.load(file, map_location="cpu", weights_only=True), file)
        vision_config, text_config = configs(vision, text)
        self.vision, self.text = BlipVisionModel(vision_config), BlipTextModel(text_config, add_pooling_layer=False)
        self.head = AestheticMLP(text_config.hidden_size)  # the same layers as LAION's
        for module, state in ((self.vision, vision), (self.text, text), (self.head, head)):
            load_weights(module, state, file, strict=False)
        self.preprocess = Preprocessing(size=vision_config.image_size, crop=(vision_config.image_size,) * 2, even_centre=True)
        own = any((Path(model) / name).is_file() for name in ("tokenizer.json", "vocab.txt"))
        tokenizer = tokenizer or (model if own else TOKENIZER)
        with fetched(str(tokenizer), "tokenizer"):
            self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        self.float().eval().requires_grad_(False)

    def forward(self, images: Tensor, prompts: list[str], **columns: Any) -> Tensor:
        """images: (B, 3, H, W) or (B, F, 3, H, W) in [0, 1]. Returns (B,) scores; prompts are cut to 35 tokens."""
        device = self.text.device
        tokens = self.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt").to(device)
        features = self.vision(self.preprocess(flatten_frames(images).to(device))).last_hidden_state
        output = self.text(
            repeat_for_frames(tokens.input_ids, images),
            attention_mask=repeat_for_frames(tokens.attention_mask, images),
            encoder_hidden_states=features,
            is_decoder=False,  # no causal mask
        )
        scores = (self.head(output.last_hidden_state[:, 0]) - MEAN) / STD
        return mean_over_frames(scores, images).to(images.device)


def split_state(state: dict[str, Tensor], origin: Any = "the checkpoint") -> tuple[dict[str, Tensor], ...]:
    """The official state dict as those of `BlipVisionModel`, `BlipTextModel` and the head, in transformers' names.

    Weights of other parts are left out, and named in a warning.

    Raises:
        ValueError: it is no such state dict.
    """
    parts: dict[str, dict[str, Tensor]] = {"blip.visual_encoder.": {}, "blip.text_encoder.": {}, "mlp.": {}}
    unknown = []
    for name, value in state.items():
        if name.startswith(UNUSED):
            continue
        prefix = next((prefix for prefix in parts if name.startswith(prefix)), None)
        if prefix is None:
            unknown.append(name)
            continue
        parts[prefix][name.removeprefix(prefix)] = value
    if not all(parts.values()):
        raise ValueError(f"{origin} is no ImageReward checkpoint: it needs the parts {', '.join(parts)} and has {sorted(state)[:3]} ...")
    say_left_out(unknown, origin)
    vision = {_vision_name(name): value for name, value in parts["blip.visual_encoder."].items()}
    return vision, parts["blip.text_encoder."], parts["mlp."]


def _vision_name(name: str) -> str:
    if name.startswith("norm."):
        return f"post_layernorm.{name.removeprefix('norm.')}"
    for official, ours in VISION_NAMES.items():
        name = name.replace(official, ours)
    return name


def configs(vision: dict[str, Tensor], text: dict[str, Tensor]):
    """`BlipVisionConfig` and `BlipTextConfig` of the sizes that the state dicts have."""
    from transformers import BlipTextConfig, BlipVisionConfig

    patch, positions = vision["embeddings.patch_embedding.weight"], vision["embeddings.position_embedding"]
    width, patch_size = patch.shape[0], patch.shape[-1]
    vision_config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=vision["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=_depth(vision, "encoder.layers."),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=patch_size * round((positions.shape[1] - 1) ** 0.5),
        patch_size=patch_size,
        layer_norm_eps=1e-6,
    )
    words = text["embeddings.word_embeddings.weight"]
    text_config = BlipTextConfig(
        vocab_size=words.shape[0],
        hidden_size=words.shape[1],
        encoder_hidden_size=width,
        intermediate_size=text["encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=_depth(text, "encoder.layer."),
        num_attention_heads=words.shape[1] // HEAD_WIDTH,
        max_position_embeddings=text["embeddings.position_embeddings.weight"].shape[0],
        layer_norm_eps=1e-12,
        is_decoder=True,  # builds the cross attention
    )
    return vision_config, text_config


def _depth(state: dict[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})
