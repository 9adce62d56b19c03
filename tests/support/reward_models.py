"""Models that rewards stand on, of random weights and a few kilobytes, and images that look like photographs."""

import numpy as np
import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer

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
