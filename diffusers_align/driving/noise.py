"""Streams of noise that seeds alone fix, whatever the batch and the number of processes."""

from __future__ import annotations

import hashlib
from typing import Any

import torch


def noise_seed(*key: Any) -> int:
    """A seed from any key, such as (seed, epoch, prompt, sample): results then depend on neither batch size nor processes."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1


def step_streams(seeds: list[int] | None) -> list[torch.Generator] | None:
    """What the steps of samples with these `seeds` draw from: other numbers than those of their initial noise."""
    return None if seeds is None else [torch.Generator("cpu").manual_seed(noise_seed(seed, "steps")) for seed in seeds]
