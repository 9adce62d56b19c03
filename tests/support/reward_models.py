"""Models that rewards stand on, of random weights and a few kilobytes, and images that look like photographs."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer

from diffusers_align.rewards.aesthetic import AestheticMLP
from diffusers_align.rewards.preprocessing import CLIP_MEAN, CLIP_STD

PROMPTS = ["a cat", "two dogs"]


def save_clip(folder, size=32, width=24):
    """A tiny random CLIP with tokenizer and image settings, as `from_pretrained` finds them."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocab = {token: i for i, token in enumerate(["<|startoftext|>", "<|endoftext|>", *letters, *(c + "</w>" for c in letters)])}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16)
    text = CLIPTextConfig(
        vocab_size=len(vocab), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16,
        projection_dim=width, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    ).to_dict()  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": size, "patch_size": 8,
        "projection_dim": width,
    }  # fmt: skip
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    image_processor(size=size).save_pretrained(folder)
    return str(folder)


def image_processor(size=32, **settings):
    try:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as Processor
    except ImportError:  # transformers 4
        from transformers import CLIPImageProcessor as Processor
    return Processor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}, **settings)


def photo_like(*shape, seed=0):
    """Smooth random images, exactly representable in 8 bits."""
    coarse = torch.rand(1, int(np.prod(shape[:-2])), 6, 6, generator=torch.Generator().manual_seed(seed))
    return (nn.functional.interpolate(coarse, size=shape[-2:], mode="bilinear").view(shape) * 255).round() / 255


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def aesthetic_checkpoint(tmp_path_factory):
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("aesthetic") / "head.pth"
    torch.save(AestheticMLP(24).state_dict(), path)
    return path


def bytes_of(images):
    """(B, 3, H, W) in [0, 1] as a list of (H, W, 3) uint8 arrays."""
    return list((images * 255).round().byte().permute(0, 2, 3, 1).numpy())


# --- CLIP: preprocessing, clip_score, pick_score, aesthetic ------------------------------------------------------------


def reference_cosines(folder, images, prompts):
    """Diagonal of the cosines by transformers alone, from 8-bit images."""
    model, tokenizer = CLIPModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    tokens = tokenizer(prompts, padding=True, truncation=True, max_length=16, return_tensors="pt")
    pixels = torch.tensor(np.stack(image_processor()(bytes_of(images))["pixel_values"]))
    with torch.no_grad():
        out = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels)
    return (out.logits_per_image / model.logit_scale.exp()).diag(), model.logit_scale.exp().detach()


def normalised(images):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    return (images - mean) / std


def weights(shapes, seed=0):
    """Random weights; norms near 1, and large enough that every part matters."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        is_scale = name.endswith("weight") and len(shape) == 1
        state[name] = 1 + 0.1 * value if is_scale else value * (0.3 if len(shape) == 1 else (1 / math.sqrt(shape[-1])))
    return state


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(state, name, x, eps):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def attend(q, k, v, heads, mask=None):
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(-3, -2) for t in (q, k, v))
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return ((logits if mask is None else logits + mask).softmax(-1) @ v).transpose(-3, -2).flatten(-2)


# --- what the image models see -----------------------------------------------------------------------------------------


def letterboxed(image, size):
    """(3, H, W) in [0, 1] as `ResizeMaxSize` and normalisation make it, by PIL's floats and numpy: (3, size, size)."""
    height, width = image.shape[1:]
    scale = size / float(max(height, width))
    rows, columns = max(1, round(height * scale)), round(width * scale)
    canvas = np.zeros((3, size, size), dtype=np.float32)
    for channel in range(3):
        small = Image.fromarray(image[channel].numpy(), "F").resize((columns, rows), Image.Resampling.BICUBIC)
        canvas[channel, (size - rows) // 2 : (size - rows) // 2 + rows, (size - columns) // 2 : (size - columns) // 2 + columns] = np.asarray(small)
    return torch.tensor((canvas - np.array(CLIP_MEAN)[:, None, None]) / np.array(CLIP_STD)[:, None, None], dtype=torch.float32)


def brightness(images, prompts, **columns):
    return images.flatten(1).mean(1)


class Scaled:
    def __init__(self, factor: float = 1.0, device: str = "cpu"):
        self.factor, self.device = factor, device

    def __call__(self, images, prompts, **columns):
        return {"reward": self.factor * brightness(images, prompts), "contrast": images.flatten(1).std(1)}
