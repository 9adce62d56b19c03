"""Tiny text encoders that also read pictures: Qwen-VL with its processor, in code."""

from __future__ import annotations

from typing import Any

import transformers

from .parts import LANGUAGE_MODEL, TEXT_WIDTH, qwen_tokenizer, seeded

PICTURE_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": TEXT_WIDTH}


class PictureProcessor:
    """What a Qwen-VL processor makes of texts and pictures. Transformers' own also needs torchvision, for videos."""

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase, image_processor: Any):
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.image_token = "<|image_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)

    def __call__(self, text: str | list[str], images: Any = None, videos: None = None, **tokenizer_kwargs: Any) -> transformers.BatchFeature:
        texts = [text] if isinstance(text, str) else list(text)
        pictures = {} if images is None else self.image_processor(images=images, return_tensors="pt")
        grids = iter(pictures.get("image_grid_thw", []))
        for i, written in enumerate(texts):
            first, *others = written.split(self.image_token)
            numbers = [int(next(grids).prod()) // self.image_processor.merge_size**2 if pictures else 1 for _ in others]
            texts[i] = first + "".join(self.image_token * number + other for number, other in zip(numbers, others))
        return transformers.BatchFeature({**self.tokenizer(texts, **{"return_tensors": "pt", **tokenizer_kwargs}), **pictures})

    def __getattr__(self, name: str) -> Any:
        if name in ("tokenizer", "image_processor"):
            raise AttributeError(name)
        return getattr(self.tokenizer, name)


def qwen_vl_tokenizer() -> transformers.PreTrainedTokenizerBase:
    tokenizer = qwen_tokenizer()
    tokenizer.add_tokens(PICTURE_TOKENS, special_tokens=True)
    return tokenizer


def qwen_vl_processor() -> PictureProcessor:
    return PictureProcessor(qwen_vl_tokenizer(), transformers.Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=56 * 56))


def qwen_vl(tokenizer: transformers.PreTrainedTokenizerBase, text_only: bool = False) -> Any:
    """Qwen 2.5 VL for `tokenizer` (or its processor), or its language model alone."""
    size = len(getattr(tokenizer, "tokenizer", tokenizer))
    text = {**LANGUAGE_MODEL, "vocab_size": size, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    if text_only:
        return seeded(transformers.Qwen2_5_VLTextModel, transformers.Qwen2_5_VLTextConfig(**text))
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in zip(("vision_start", "vision_end", "image", "video"), PICTURE_TOKENS)}
    return seeded(transformers.Qwen2_5_VLForConditionalGeneration, transformers.Qwen2_5_VLConfig(text_config=text, vision_config=VISION, **ids))
