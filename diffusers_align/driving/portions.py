"""Samples that a pipeline makes portion after portion: chunks of a video, tiles of a picture, each of which its scheduler walks by a schedule of its own.

The last state is the last portion's alone then, so that no final latents are a whole sample: all portions' last states are. A pipeline that walks several
schedules over one sample, as a second pass at a larger size does, goes on from where the one before ended, and is told apart by that.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from .scheduler_hook import Step

IN_PORTIONS = (
    "{} makes a sample portion after portion (chunks of a video, tiles), each of them by a schedule of its own, so that latents of one are no whole sample: {}."
)


class _Enough(BaseException):
    """Ends a call at its second schedule."""


def in_portions(drive: Callable[[Callable[[Step], Tensor]], object]) -> bool:
    """Whether the second schedule of a call begins with the same state wherever the first one has ended.

    Args:
        drive: `drive(on_step)` makes the call without its denoisers, with the same draws each time. It walks several schedules.
    """
    states: list[Tensor] = []

    def end_at(value: float) -> Callable[[Step], Tensor]:
        def on_step(step: Step) -> Tensor:
            step.skip()
            if step.child == 0 and step.portion:
                states.append(step.sample.detach().clone())
                raise _Enough
            return torch.full_like(step.sample, value)

        return on_step

    for value in (0.0, 1.0):
        with suppress(_Enough), torch.no_grad():
            drive(end_at(value))
    return len(states) == 2 and torch.equal(*states)
