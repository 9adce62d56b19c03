"""mini-clip, and its noise-aware image tower."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from ..noisy_clip import NoisyCLIP, TextTower
from ..teaching import IMAGE_SIZE, NoisedScenes, build_tokenizer, contrast, fit, judged_images, save_half, text_config, tokenize


def train_clip(out: Path, minutes: float) -> None:
    """CLIPModel with a ViT on 4-pixel patches; the contrast leaves out pairs whose captions are equal."""
    images, scenes, _ = judged_images(out, 16000, seed=4)
    tokenizer, captions = build_tokenizer(), [scene.caption() for scene in scenes]
    ids = tokenize(tokenizer, captions)
    caption_id = torch.tensor([hash(c) for c in captions])
    vision = {
        "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": IMAGE_SIZE,
        "patch_size": 4, "projection_dim": 64,
    }  # fmt: skip
    text = text_config(tokenizer, 96, 2).to_dict() | {"projection_dim": 64}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))

    def loss_fn() -> Tensor:
        index = torch.randint(0, len(images), (128,))
        pixels = images[index].float() / 127.5 - 1
        return contrast(clip(input_ids=ids[index], pixel_values=pixels).logits_per_image, caption_id[index])

    def save() -> None:
        clip.save_pretrained(out / "mini-clip")
        tokenizer.save_pretrained(out / "mini-clip")
        settings = {"crop_size": IMAGE_SIZE, "size": {"shortest_edge": IMAGE_SIZE}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        from transformers import CLIPImageProcessor

        CLIPImageProcessor(**settings).save_pretrained(out / "mini-clip")

    fit("clip", [clip], loss_fn, save, minutes, lr=1e-3)


def train_noisy_clip(out: Path, minutes: float) -> None:
    """The image tower of a noise-aware CLIP: the contrast of `train_clip` at every noise level, against mini-clip's text tower, frozen."""
    data = NoisedScenes(out, seed=6)
    captions = [scene.caption() for scene in data.scenes]
    tower = TextTower(out / "mini-clip")
    texts = torch.cat([tower(captions[start : start + 500]) for start in range(0, len(captions), 500)])
    clip = NoisyCLIP(projection_dim=texts.shape[1]).to(memory_format=torch.channels_last)
    caption_id = torch.tensor([hash(c) for c in captions])

    def loss_fn() -> Tensor:
        index, state = data.batch(128)
        return contrast(clip.logit_scale.exp() * clip(*state) @ texts[index].T, caption_id[index])

    fit("noisy clip", [clip], loss_fn, lambda: save_half(clip, out / "noisy-clip"), minutes, lr=2e-3)
