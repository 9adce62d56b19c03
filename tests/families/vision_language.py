"""Tiny text encoders that read pictures too: Qwen 2.5 VL and Qwen 3 VL, with their tokenizer and processor."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from .parts import LANGUAGE_MODEL, TEXT_WIDTH, byte_vocabulary, seeded

VISION_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
PATCH = 4
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def vision_tokenizer() -> transformers.Qwen2Tokenizer:
    """One token a byte, the marks of pictures, and a chat template whose messages are strings or lists of text and pictures."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *VISION_TOKENS]
    tokenizer = transformers.Qwen2Tokenizer(vocab=byte_vocabulary(), merges=[], additional_special_tokens=special, model_max_length=2048)
    tokenizer.chat_template = CHAT
    return tokenizer


def _without_videos(cls: type) -> type:
    """The processor without a video processor, which needs torchvision."""
    return type(cls.__name__, (cls,), {"check_argument_for_proper_class": lambda self, name, value: type(value)})


def vision_processor(cls: type = transformers.Qwen2VLProcessor, tokens: int = 1) -> transformers.ProcessorMixin:
    """Makes each picture as many `tokens`, each of four patches of 4 x 4 pixels."""
    area = tokens * (2 * PATCH) ** 2
    pictures = transformers.Qwen2VLImageProcessor(patch_size=PATCH, merge_size=2, min_pixels=area, max_pixels=area, temporal_patch_size=2)
    return _without_videos(cls)(image_processor=pictures, tokenizer=vision_tokenizer(), chat_template=CHAT)


def _token_ids(tokenizer: transformers.Qwen2Tokenizer) -> dict[str, int]:
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    return dict(zip(names, tokenizer.convert_tokens_to_ids(VISION_TOKENS)))


def qwen2_5_vl(cls: type = transformers.Qwen2_5_VLForConditionalGeneration) -> torch.nn.Module:
    tokenizer = vision_tokenizer()
    text = {**LANGUAGE_MODEL, "vocab_size": len(tokenizer), "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": TEXT_WIDTH, "patch_size": PATCH, "window_size": 16,
        "fullatt_block_indexes": [0],
    }  # fmt: skip
    return seeded(cls, transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_token_ids(tokenizer)))


def qwen3_vl(cls: type = transformers.Qwen3VLForConditionalGeneration, **text_config: Any) -> torch.nn.Module:
    tokenizer = vision_tokenizer()
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 10000.0}
    text = {**LANGUAGE_MODEL, "vocab_size": len(tokenizer), "rope_parameters": rope, **text_config}
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": TEXT_WIDTH, "patch_size": PATCH,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    return seeded(cls, transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **_token_ids(tokenizer)))
