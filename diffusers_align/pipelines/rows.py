"""Lists and tensors of a stock call that are as long as its list of prompts: one entry for each prompt, or all of them for each of them?

Stock pipelines take some one way (pictures to start from), some the other (pictures to refer to, frames that control), and names do not tell. So the
pipeline is asked: called for the first prompt alone with all entries, does it begin to make one sample, and do the other entries make a difference? Some
leave out what they have no prompt for.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..condition import Condition
from ..driving.denoisers import denoisers
from ..driving.guidance import of_the_device
from ..driving.scheduler_hook import Step

if TYPE_CHECKING:
    from .base import WrappedPipeline


def with_own_rows(wrapped: WrappedPipeline, condition: Condition) -> Condition:
    """The condition with those of its shared arguments per sample of which the pipeline takes one a prompt."""
    names = [name for name, value in condition.kwargs.items() if _as_many(value, len(condition)) and not name.startswith("callback")]
    if not names or all(_is_shared(wrapped, condition, name, set()) for name in names):
        return condition
    own = {name for name in names if len(names) == 1 or not _is_shared(wrapped, condition, name, set(names) - {name})}
    return _declared(condition, own)


def _as_many(value: Any, number: int) -> bool:
    """Whether a value may be of that many prompts. Lists of numbers are sizes and schedules."""
    if isinstance(value, (Tensor, np.ndarray)):
        return number > 1 and value.ndim > 1 and len(value) == number
    return number > 1 and isinstance(value, (list, tuple)) and len(value) == number and not all(isinstance(x, (int, float)) for x in value)


def _declared(condition: Condition, own: set[str]) -> Condition:
    shared = {name: value for name, value in condition.kwargs.items() if name not in own}
    return replace(condition, kwargs=shared, per_sample={**condition.per_sample, **{name: condition.kwargs[name] for name in own}})


def _is_shared(wrapped: WrappedPipeline, condition: Condition, name: str, own: set[str]) -> bool:
    """Whether the first prompt takes all of an argument, where each prompt has its own of `own`."""
    single, value = _declared(condition, own).select([0]), condition.kwargs[name]
    given = _asked(wrapped, single)
    if given is None:
        return False
    alike = value[[0] * len(value)] if isinstance(value, (Tensor, np.ndarray)) else [value[0]] * len(value)
    other = _asked(wrapped, replace(single, kwargs={**single.kwargs, name: alike}))
    return other is None or len(given) != len(other) or not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(given, other))


class _Leave(Exception):
    """Ends a call whose answer is known."""


@torch.no_grad()
def _asked(wrapped: WrappedPipeline, single: Condition) -> list[Tensor] | None:
    """What the denoisers get before the first step of a call that makes one sample; None if it fails or makes several."""
    found, rows = [], []

    def keep(module, args, kwargs):
        found.extend(x.detach().clone() for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor))

    def leave(step: Step) -> None:
        rows.append(len(step.sample))
        raise _Leave

    handles = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in denoisers(wrapped.pipeline).values()]
    options = {"global_seed": 0, "output_type": "latent"}  # the denoiser is really asked: some pipelines leave it to that one to refuse rows that do not fit
    try:
        with suppress(_Leave):
            wrapped.drive(single, [torch.Generator().manual_seed(0)], leave, **options)
    except Exception as error:  # however a pipeline says that so many are too many
        if of_the_device(error):
            raise
    finally:
        for handle in handles:
            handle.remove()
    return found if rows == [1] else None
