"""Pipelines that make one sample a call, and take its prompt as a string. Others take lists, also of one. One generator is handed to all as such."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch

from ..condition import belongs_to_samples
from .calls import Calls
from .pipeline_state import own_arguments

# Classes whose call refused lists of one and took what is in them.
_SINGLE: WeakSet[type] = WeakSet()
_REFUSALS = (AttributeError, TypeError, ValueError)


def run(calls: Calls, call: dict[str, Any], begun: Callable[[], bool] = lambda: False) -> Any:
    """`calls.run` with copies of the arguments that the pipeline may write into. Where lists of one prompt and one generator are refused before anything was
    done, what is in them is given, and so from then on.

    Args:
        begun: whether the call has taken a step.

    Raises:
        ValueError: several prompts for a pipeline that takes one. What the pipeline raises comes through.
    """
    # The draws are the same. Some pipelines take a list of generators for one of frames.
    call = {name: value[0] if name == "generator" and isinstance(value, list) and len(value) == 1 else value for name, value in call.items()}
    prompts, known = call.get("prompt"), type(calls.pipeline) in _SINGLE
    if not isinstance(prompts, list):
        return calls.run(own_arguments(call))
    if known and len(prompts) == 1:
        return calls.run(own_arguments(_singly(call)))
    states = _states(call)
    try:
        return calls.run(own_arguments(call))
    except _REFUSALS as error:
        if begun() or not all(map(torch.equal, states, _states(call))):
            raise
        if len(prompts) == 1:
            return _run_singly(calls, call, error, begun)
        if known or _declares_a_string(calls):
            raise ValueError(f"{calls.name} takes one prompt a call, got {len(prompts)}: give them one by one (batch_size=1, --train_batch_size 1).") from error
        raise


def _run_singly(calls: Calls, call: dict[str, Any], refusal: Exception, begun: Callable[[], bool]) -> Any:
    try:
        output = calls.run(own_arguments(_singly(call)))
    except _REFUSALS as error:
        if not begun() and str(error) == str(refusal):  # of another argument
            raise refusal from None
        raise
    finally:
        if begun():
            _SINGLE.add(type(calls.pipeline))
    return output


def _singly(call: dict[str, Any]) -> dict[str, Any]:
    """The call with what is in its lists of one text that belongs to the sample, and of one generator, in their place."""
    lists = {name: value for name, value in call.items() if isinstance(value, list) and len(value) == 1}
    own = {name: v[0] for name, v in lists.items() if name == "generator" or (belongs_to_samples(name) and isinstance(v[0], str))}
    return {**call, **own}


def _states(call: dict[str, Any]) -> list[torch.Tensor]:
    """Of the call's generators: a pipeline that has drawn cannot be called again as if it had not."""
    given = call.get("generator")
    return [generator.get_state() for generator in (given if isinstance(given, list) else [given]) if generator is not None]


def _declares_a_string(calls: Calls) -> bool:
    declared = calls.parameters["prompt"].annotation
    return declared is not inspect.Parameter.empty and "list" not in str(declared).lower()
