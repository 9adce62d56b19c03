"""Is the wanted text in the image? The text-rendering reward of Flow-GRPO (https://arxiv.org/abs/2505.05470, section 4).

reward = max(0, 1 - d / n): d is the edit distance between the recognised and the wanted text, n the wanted text's length, both in
lower case without white space. Text that contains the wanted one scores 1.

After https://github.com/yifan123/flow_grpo (`ocr.py`, read, not run), with three differences: the recogniser is RapidOCR, PP-OCR's models on ONNX
Runtime, in the place of PaddleOCR; a prompt that wants no text is NaN and no crash; a recogniser's error is an error and no score of 0.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .preprocessing import flatten_frames, mean_over_frames, repeat_for_frames, where_finite
from .wire import to_pil

QUOTED = re.compile(r'"([^"]+)"|\u201c([^\u201d]+)\u201d')


class OCRScore:
    """Share of the wanted text that can be read in the image; of a video, the mean over frames. Not differentiable.

    The wanted text is the column `text`, or what the prompt has between its first double quotes; NaN where there is neither.

    Args:
        recogniser: takes a PIL image and returns the text in it; by default RapidOCR, which has its models in its package.
    """

    name = "ocr"
    scores_only = "prompts that have the wanted text between double quotes, or rows with it in a column `text`"

    def __init__(self, recogniser: Callable[[Any], str] | None = None):
        self.recogniser = recogniser or rapid_ocr()

    def __call__(self, images: Tensor, prompts: list[str], **columns: Any) -> Tensor:
        """images: (B, 3, H, W) or (B, F, 3, H, W) in [0, 1], read at 8 bits. Returns (B,) in [0, 1]."""
        texts = [text or quoted(prompt) for text, prompt in zip(columns.get("text") or [None] * len(prompts), prompts)]
        owners = repeat_for_frames(torch.arange(len(prompts)), images).tolist()
        frames = flatten_frames(images)
        scores = [text_score(self.recogniser(picture), texts[owner]) if texts[owner] else torch.nan for picture, owner in zip(to_pil(frames), owners)]
        return mean_over_frames(where_finite(torch.tensor(scores, device=images.device), frames), images)


def quoted(prompt: str) -> str | None:
    """What stands between the first double quotes, straight or curly."""
    found = QUOTED.search(prompt)
    return found and (found[1] or found[2])


def text_score(recognised: str, wanted: str) -> float:
    """max(0, 1 - edit distance / length), 1 where the wanted text is contained; NaN where it is blank."""
    recognised, wanted = ("".join(text.split()).lower() for text in (recognised, wanted))
    if not wanted:
        return float("nan")
    return 1.0 if wanted in recognised else max(0.0, 1 - edit_distance(recognised, wanted) / len(wanted))


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's: the fewest insertions, deletions and replacements of one character."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def rapid_ocr() -> Callable[[Any], str]:
    """RapidOCR as a function from a PIL image to its text, line after line.

    Raises:
        ImportError: it is not installed.
    """
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise ImportError("The reward 'ocr' reads images with RapidOCR, which is not installed. Run `pip install rapidocr onnxruntime`.") from error
    engine = RapidOCR(params={"Global.log_level": "critical"})  # it warns of each image without text
    return lambda picture: " ".join(engine(picture).txts or ())
