"""A vision-language model as the judge, behind an OpenAI-style HTTP API (`/chat/completions`), by a rubric in words.

Any server that speaks it will do: vLLM, SGLang, llama.cpp, Ollama, or a hosted one. The image goes as a lossless PNG; the answer is
a number from 0 to `scale`, divided by `scale`. Judges are noisy and can be flattered: look at another reward beside them.
"""

from __future__ import annotations

import json
import logging
import os
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ..checks.ranges import Count, CountOrNone, NonNegative, Positive, checked
from . import web
from .preprocessing import where_finite
from .wire import to_png

RUBRIC = """You judge an image that was generated from this prompt:

{prompt}

Say from 0 to {scale} how well the image shows what the prompt asks for (objects, counts, colours, positions, text) and how good it
looks. 0 is another subject altogether, {scale} is perfect. Answer with one line: Score: <number>"""

logger = logging.getLogger(__name__)


class VLMJudge:
    """Scores in [0, 1] of a vision-language model; NaN where its answer holds no number or does not come. Not differentiable.

    Args:
        model: the model's name on the server.
        url: the API's address, as in `http://localhost:8000/v1`; the environment's OPENAI_BASE_URL if absent.
        rubric: the question; `{prompt}` and `{scale}` are filled in.
        scale: the best mark.
        api_key_variable: the environment variable that holds the key; no key is sent where it is not set.
        concurrency: requests at a time.
        max_frames: of a video, so many frames are shown, equally far apart.
        options: further fields of the request.
        timeout, retries, backoff: as in `RemoteReward`, for each image.

    Raises:
        ValueError: model or address are missing.
    """

    name = "vlm_judge"

    @checked
    def __init__(
        self,
        model: str | None = None,
        url: str | None = None,
        rubric: str = RUBRIC,
        scale: Positive = 10,
        api_key_variable: str = "OPENAI_API_KEY",
        concurrency: Count = 8,
        max_frames: Count = 8,
        options: dict[str, Any] | None = None,
        timeout: Positive = 60.0,
        retries: CountOrNone = 3,
        backoff: NonNegative = 1.0,
    ):
        url = url or os.environ.get("OPENAI_BASE_URL")
        if not model or not url:
            raise ValueError(
                "The reward 'vlm_judge' needs a model (`--reward_model NAME`) and the address of an OpenAI-style API (the environment variable "
                f"OPENAI_BASE_URL, such as http://localhost:8000/v1): got the model {model!r} and the address {url!r}."
            )
        self.model, self.url, self.rubric, self.scale = model, url.rstrip("/") + "/chat/completions", rubric, scale
        self.api_key_variable, self.concurrency, self.max_frames = api_key_variable, concurrency, max_frames
        self.options = {"temperature": 0, "max_tokens": 64} if options is None else options
        self.patience = {"timeout": timeout, "retries": retries, "backoff": backoff}

    def __call__(self, images: Tensor, prompts: list[str], **columns: Any) -> Tensor:
        """images: (B, 3, H, W) or (B, F, 3, H, W) in [0, 1], shown at 8 bits. Returns (B,).

        Raises:
            RequestRefused: the server refuses the request: a wrong key, an unknown model.
            ConnectionError: not one of the images got an answer.
        """
        with ThreadPoolExecutor(max(1, min(self.concurrency, len(prompts)))) as pool:
            answers = list(pool.map(self._ask, images.detach().cpu(), prompts))
        lost = [answer for answer in answers if isinstance(answer, web.Unreachable)]
        if lost and len(lost) == len(answers):
            raise lost[0]
        marks = [torch.nan if isinstance(answer, web.Unreachable) else parse_mark(answer, self.scale) / self.scale for answer in answers]
        for prompt, answer, mark in zip(prompts, answers, marks):
            if mark != mark:
                logger.warning("No mark for %r: %s", prompt, str(answer)[:300])
        return where_finite(torch.tensor(marks, device=images.device), images)

    def _ask(self, image: Tensor, prompt: str) -> str | web.Unreachable:
        """The model's answer, or what kept it from answering."""
        shown = image[None] if image.ndim == 3 else image[torch.linspace(0, len(image) - 1, min(len(image), self.max_frames)).round().long()]
        question = self.rubric.replace("{scale}", f"{self.scale:g}").replace("{prompt}", prompt)
        content = [{"type": "text", "text": question}]
        content += [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{file}"}} for file in to_png(shown)]
        body = json.dumps({"model": self.model, "messages": [{"role": "user", "content": content}], **self.options}).encode()
        key = os.environ.get(self.api_key_variable)
        try:
            answer = web.request(self.url, body, headers={"Authorization": f"Bearer {key}"} if key else {}, **self.patience)
        except web.Unreachable as error:
            return error
        try:
            return str(json.loads(answer)["choices"][0]["message"]["content"])
        except (ValueError, KeyError, IndexError, TypeError):
            return f"(no chat completion) {answer[:200]!r}"


def parse_mark(text: str, scale: float) -> float:
    """The number after the last "score", else the only number of the text; NaN if there is none, or it is not in [0, scale]. The scale itself, which answers
    repeat, is no number of the text.

    >>> parse_mark("Score: 7.5/10", 10), parse_mark("8 out of 10", 10), parse_mark("Score (0-10): 8,5", 10)
    (7.5, 8.0, 8.5)
    """
    number = r"-?\d+(?:[.,]\d+)?"
    text = re.sub(rf"(?:/|\bout of)\s*{scale:g}\b", "", text)
    text = re.sub(rf"[(\[]?\b\d+\s*(?:[-–—]|to)\s*{scale:g}\b[)\]]?", "", text)
    found = re.findall(rf"score\W{{0,4}}?(?:is\s+)?({number})", text, re.IGNORECASE)[-1:] or re.findall(number, text)
    mark = float(found[0].replace(",", ".")) if len(found) == 1 else torch.nan
    return mark if 0 <= mark <= scale else torch.nan
