"""Seconds of processor time by part of a process: denoiser, backward, autoencoder, text encoders, optimizer, and what is left.

Classes are wrapped, not objects, so that code of anybody is measured without a change to it. Needs torch, diffusers and transformers alone.
"""

from __future__ import annotations

import functools
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

DENOISER, BACKWARD, AUTOENCODER, TEXT, OPTIMIZER, REWARD = "denoiser, forward", "backward", "autoencoder", "text encoders", "optimizer", "reward"
DENOISERS = ("UNet2DConditionModel", "SD3Transformer2DModel")
ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel")


class Parts:
    """Where the time went since `clear`.

    Attributes:
        seconds: of each part, without what is measured inside of it: a forward pass that a backward pass repeats counts as forward.
        counts: `calls` and `rows` of the denoiser, `steps` of optimizers, and `trainable`, the largest number of parameters that one of them had.
    """

    def __init__(self, clock: Callable[[], float] = time.process_time):
        self.clock = clock
        self.seconds: dict[str, float] = defaultdict(float)
        self.counts: Counter[str] = Counter()

    def clear(self) -> None:
        self.seconds.clear()
        self.counts.clear()

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Charge the time inside to `name`, but for what is charged to others."""
        start, before = self.clock(), sum(self.seconds.values())
        try:
            yield
        finally:
            self.seconds[name] += self.clock() - start - (sum(self.seconds.values()) - before)

    def wrap(self, owner: Any, attribute: str, name: str, seen: Callable[..., None] = lambda *args, **kwargs: None) -> None:
        """Charge the calls of a function of a class, a module or an object to `name`, and show their arguments to `seen`."""
        original = getattr(owner, attribute)

        @functools.wraps(original)
        def timed_call(*args, **kwargs):
            seen(*args, **kwargs)
            with self.timed(name):
                return original(*args, **kwargs)

        setattr(owner, attribute, timed_call)

    def watch(self) -> None:
        """Measure everything of this process from now on."""
        import diffusers
        import transformers

        for name in DENOISERS:
            self.wrap(getattr(diffusers, name), "forward", DENOISER, self._denoised)
        for name in ("encode", "decode"):
            self.wrap(diffusers.AutoencoderKL, name, AUTOENCODER)
        for name in ENCODERS:
            self.wrap(getattr(transformers, name), "forward", TEXT)
        for name in ("backward", "grad"):
            self.wrap(torch.autograd, name, BACKWARD)
        self.wrap(torch.optim.AdamW, "step", OPTIMIZER, self._stepped)

    def _denoised(self, model, sample=None, *args, **kwargs) -> None:
        sample = kwargs["hidden_states"] if sample is None else sample
        self.counts["calls"] += 1
        self.counts["rows"] += len(sample)

    def _stepped(self, optimizer, *args, **kwargs) -> None:
        trained = sum(p.numel() for group in optimizer.param_groups for p in group["params"] if p.requires_grad)
        self.counts["steps"] += 1
        self.counts["trainable"] = max(self.counts["trainable"], trained)
