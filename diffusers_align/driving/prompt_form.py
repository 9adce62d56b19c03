"""Pipelines that make one sample a call, and take its prompt as a string, or its picture as such. Others take lists, also of one. One generator is handed
to all as such."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch

from ..condition import belongs_to_samples
from .calls import Calls
from .module_tree import class_of
from .pipeline_state import own_arguments

# Classes whose call refused lists of one and took what is in them, with the kinds of lists that it was. Texts beside the prompt come first: that a call
# takes the prompt as a string beside a string says nothing of lists of prompts.
_SINGLE: WeakKeyDictionary[type, tuple[str, ...]] = WeakKeyDictionary()
# Classes that refused one text for several samples, and took as many.
_REPEATED: WeakSet[type] = WeakSet()
_FORMS = (("others",), ("texts",), ("pictures",), ("texts", "pictures"))
_REFUSALS = (AssertionError, AttributeError, TypeError, ValueError)
_ONE_BY_ONE = "(batch_size=1, --train_batch_size 1)"


def run(calls: Calls, call: dict[str, Any], begun: Callable[[], bool] = lambda: False) -> Any:
    """`calls.run` with copies of the arguments that the pipeline may write into. Where lists of one prompt or of one picture are refused
    before anything was done, what is in them is given, and so from then on.

    Args:
        begun: whether the call has taken a step.

    Raises:
        ValueError: several prompts for a pipeline that takes one; several samples' pictures that are refused. What the pipeline raises comes through.
    """
    # The draws are the same. Some pipelines take a list of generators for one of frames.
    call = {name: value[0] if name == "generator" and isinstance(value, list) and len(value) == 1 else value for name, value in call.items()}
    prompts, known = call.get("prompt"), _SINGLE.get(class_of(calls.pipeline), ())
    if not isinstance(prompts, list):
        return calls.run(own_arguments(call))
    if class_of(calls.pipeline) in _REPEATED:
        call = calls.spread(call)
    if known and len(prompts) == 1:
        return calls.run(own_arguments(_singly(call, known)))
    states = _states(call)
    try:
        return calls.run(own_arguments(call))
    except _REFUSALS as error:
        if begun() or not all(map(torch.equal, states, _states(call))):
            raise
        spread = calls.spread(call)
        if any(spread[name] is not value for name, value in call.items()):
            try:
                return calls.run(own_arguments(spread))
            except _REFUSALS:
                if begun():
                    raise
            finally:
                if begun():
                    _REPEATED.add(class_of(calls.pipeline))
        if len(prompts) == 1:
            return _run_singly(calls, call, error, begun)
        if "texts" in known or _declares_a_string(calls):
            raise ValueError(f"{calls.name} takes one prompt a call, got {len(prompts)}: give them one by one {_ONE_BY_ONE}.") from error
        lists = sorted(name for name, value in call.items() if isinstance(value, list) and len(value) == len(prompts) and _is_picture(value[0]))
        if pictures := [name for name in lists if name in str(error) or "list" in str(error)]:
            raise ValueError(
                f"{calls.name} refuses {len(prompts)} samples with {', '.join(pictures)} of their own: {error} If it takes one a call, give them one by one "
                f"{_ONE_BY_ONE}."
            ) from error
        raise


def takes_one_prompt(calls: Calls) -> bool:
    """Whether the pipeline is known, by its signature or by a call that it refused, to take one prompt a call."""
    refused = {*_SINGLE.get(class_of(calls.pipeline), ())} - {"others"}
    return bool(refused) or ("prompt" in calls.parameters and _declares_a_string(calls))


def _run_singly(calls: Calls, call: dict[str, Any], refusal: Exception, begun: Callable[[], bool]) -> Any:
    """The call in the first of the forms that is not refused; if all are, the refusal that says something new is the one to raise."""
    states, tried, last = _states(call), [_unpacked(call, ())], refusal
    for kinds in _FORMS:
        if (names := _unpacked(call, kinds)) in tried:
            continue
        tried.append(names)
        try:
            return calls.run(own_arguments(_singly(call, kinds)))
        except _REFUSALS as error:
            if begun() or not all(map(torch.equal, states, _states(call))):
                raise
            last = error if str(error) != str(refusal) else last
        finally:
            if begun():
                _SINGLE[class_of(calls.pipeline)] = kinds
    raise last from None


def _unpacked(call: dict[str, Any], kinds: tuple[str, ...]) -> set[str]:
    """The names of the lists of one text that belongs to the sample ("texts"; "others" without the prompt), and of one picture or film ("pictures")."""
    lists = {name: value[0] for name, value in call.items() if isinstance(value, list) and len(value) == 1}
    texts = {name for name, value in lists.items() if belongs_to_samples(name) and isinstance(value, str)}
    pictures = {name for name, value in lists.items() if not belongs_to_samples(name) and _is_picture(value)}
    found = {"texts": texts, "others": texts - {"prompt"}, "pictures": pictures}
    return set().union(*(found[kind] for kind in kinds))


def _singly(call: dict[str, Any], kinds: tuple[str, ...]) -> dict[str, Any]:
    """The call with what is in its lists of these kinds in their place."""
    return {**call, **{name: call[name][0] for name in _unpacked(call, kinds)}}


def _is_picture(value: Any) -> bool:
    """A PIL picture, or the list of a film's."""
    return all(hasattr(item, "getpixel") for item in value) if isinstance(value, list) and value else hasattr(value, "getpixel")


def _states(call: dict[str, Any]) -> list[torch.Tensor]:
    """Of the call's generators: a pipeline that has drawn cannot be called again as if it had not."""
    given = call.get("generator")
    return [generator.get_state() for generator in (given if isinstance(given, list) else [given]) if generator is not None]


def _declares_a_string(calls: Calls) -> bool:
    declared = calls.parameters["prompt"].annotation
    return declared is not inspect.Parameter.empty and "list" not in str(declared).lower()
