"""Samples that a pipeline makes portion after portion: chunks of a video, tiles of a picture, each of which its scheduler walks by a schedule of its own.

The last state is the last portion's alone then, so that no final latents are a whole sample: all portions' last states are. A pipeline may also walk several
schedules over one sample. A second pass at a larger size goes on from where the one before ended; one that begins anew leaves nothing of the first in what
it makes. Both are told apart by trying.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .calls import calls_of
from .pipeline_state import Enough
from .scheduler_hook import Step

IN_PORTIONS = (
    "{} makes a sample portion after portion (chunks of a video, tiles), each of them by a schedule of its own, so that latents of one are no whole sample: {}."
)

# `drive(on_step)` makes a call of several schedules without its denoisers, with the same draws each time, and returns what it makes.
Drive = Callable[[Callable[[Step], Tensor]], Any]
_KNOWN: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def refuse_portions(pipeline, drive: Drive, what_to_do: str) -> None:
    """Raise a ValueError if a pipeline, which walks several schedules in a call, makes a portion of the sample by each; found out once."""
    if pipeline not in _KNOWN:
        with torch.no_grad():
            _KNOWN[pipeline] = in_portions(drive)
    if _KNOWN[pipeline]:
        raise ValueError(IN_PORTIONS.format(calls_of(pipeline).name, what_to_do))


def in_portions(drive: Drive) -> bool:
    """Whether the second schedule of a call begins with the same state wherever the first one has ended, and what is made has a part of both."""
    starts: list[Tensor] = []

    def leave(step: Step) -> None:
        starts.append(step.sample.detach().clone())
        raise Enough

    for seed in (0, 1):
        with suppress(Enough):
            drive(_first_ends(seed, leave))
    if len(starts) < 2 or not torch.equal(*starts):
        return False
    one, other = (pytree.tree_leaves(drive(_first_ends(seed, lambda step: torch.zeros_like(step.sample)))[0]) for seed in (0, 1))
    return not all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(one, other))


def _first_ends(seed: int, later: Callable[[Step], Tensor]) -> Callable[[Step], Tensor]:
    """An `on_step` that ends the first schedule of the pipeline's own scheduler at noise of this seed, and asks `later` in those behind it."""

    def on_step(step: Step) -> Tensor:
        step.skip()
        if step.child:
            return step.sample
        if step.portion:
            return later(step)
        return torch.randn(step.sample.shape, generator=torch.Generator().manual_seed(seed)).to(step.sample)

    return on_step
