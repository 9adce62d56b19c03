"""Step callbacks of the stock call: what they do after its last step is no solver's, and would be lost where final states are judged and decoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor


class Watched:
    """A `callback_on_step_end` that is called as it is.

    Attributes:
        changed: whether its latest call has put other latents in the place of the solver's.
    """

    def __init__(self, callback: Callable):
        self.callback, self.changed = callback, False

    def __call__(self, pipeline, step: int, timestep, tensors: dict[str, Any]) -> Any:
        before = tensors.get("latents")
        kept = before.clone() if isinstance(before, Tensor) else None
        found = self.callback(pipeline, step, timestep, tensors)
        after = found.get("latents", before) if isinstance(found, dict) else before
        self.changed = isinstance(after, Tensor) and (kept is None or not _equal(after, kept))
        return found


def _equal(one: Tensor, other: Tensor) -> bool:
    """Also where both are NaN."""
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())


def watched(callback: Callable) -> Callable:
    """The callback, watched; diffusers' own kinds, which pipelines ask for their inputs and which leave latents alone, as they are."""
    return callback if isinstance(callback, (Watched, PipelineCallback, MultiPipelineCallbacks)) else Watched(callback)


def check_last_step(arguments: Mapping[str, Any]) -> None:
    """After a call with these arguments.

    Raises:
        ValueError: its callback has changed the latents after the last step, so that a reward would judge another picture than the one returned.
    """
    callback = arguments.get("callback_on_step_end")
    if isinstance(callback, Watched) and callback.changed:
        raise ValueError(
            "callback_on_step_end changes the latents after the last step, where rewards judge and pictures are made of the solver's own: change them at "
            "earlier steps alone, or leave it out."
        )
