"""Guidance as a component: what a pipeline's guiders take is an argument of its call, for the time of that call.

A guider (`diffusers.guiders`) is a component with settings of its own, `guidance_scale` among them, where older pipelines have arguments. Each
call works with copies: the user's guider keeps its settings, and what one call leaves in it (a momentum, the step that it is at) is not there in
the next, so that a call that is made again is the same call.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from diffusers.utils import logging
from torch import nn

from ..checks.ranges import check_value
from .parts import components_of
from .replacements import held, replaced

logger = logging.get_logger(__name__)

_WORD = "guider"
_PREPARE = ("prepare_inputs", "prepare_inputs_from_block_state")


def guiders(pipeline) -> dict[str, BaseGuidance]:
    """The pipeline's guiders by component name."""
    return {name: component for name, component in components_of(pipeline).items() if isinstance(component, BaseGuidance)}


def guider_parameters(pipeline) -> dict[str, inspect.Parameter]:
    """What the guiders take, by the argument's name, with their present values.

    A field such as `guidance_scale` goes to all of them. Where there are several, each has its own beside it, named as the component is:
    `audio_guidance_scale` for the `audio_guider`, `guidance_scale_2` for `guider_2`. `guidance=False` switches all of them off.
    """
    found: dict[str, Any] = {"guidance": True} if guiders(pipeline) else {}
    for component, guider in guiders(pipeline).items():
        for name in guider.config:
            if not name.startswith("_"):
                found.setdefault(name, _value(guider, name))
                found.setdefault(_own_name(component, name), _value(guider, name))
    return {name: inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value) for name, value in found.items()}


@contextmanager
def guided(pipeline, settings: dict[str, Any]) -> Iterator[None]:
    """Context: the pipeline's guiders are copies with these `settings`, by the names of `guider_parameters`; None leaves one as it is. A guider
    that gets a setting is on, unless that is `enabled=False`: some pipelines come with theirs switched off. With `guidance=False` it hands on the
    conditional prediction, and the pipeline encodes what it always does: with `enabled=False` some have no negative prompt where they need one.

    A guider that compares a prediction with itself is reported, once for a pipeline.

    Raises:
        ValueError: a setting that the guider does not take for a call, or a `guidance` that is no switch.
    """
    switch = settings.get("guidance")
    if not isinstance(switch, bool | None):
        raise ValueError(f"guidance=False switches the guiders off, True leaves them on, got {switch!r}; how strong they are is guidance_scale.")
    with ExitStack() as stack:
        for component, guider in guiders(pipeline).items():
            own = _copied(guider)
            given = {field: settings[name] for field in guider.config for name in (field, _own_name(component, field)) if settings.get(name) is not None}
            if given:
                _set(own, {"enabled": True} | given)
            for method in _PREPARE if switch is not False else ():
                stack.enter_context(replaced(own, method, partial(_watched, pipeline, component)))
            if switch is False:
                own.__class__ = _conditional(type(own))
            stack.enter_context(held(pipeline, component, own))
        yield


def state_of(pipeline) -> dict[str, list]:
    """The settings of the guiders in plain values: what a text encoder may look at to know whether a negative prompt is needed."""
    return {
        component: [type(guider).__name__, *(repr(_value(guider, name)) for name in guider.config if not name.startswith("_"))]
        for component, guider in guiders(pipeline).items()
    }


def _own_name(component: str, field: str) -> str:
    before, _, after = component.partition(_WORD)
    return f"{before}{field}{after}"


def _attribute(guider: BaseGuidance, field: str) -> str:
    """Where a guider keeps a field of its config: diffusers has `_start`, `_stop` and `_enabled` beside plain names."""
    return next((name for name in (field, f"_{field}") if name in guider.__dict__), field)


def _value(guider: BaseGuidance, field: str) -> Any:
    return guider.__dict__.get(_attribute(guider, field), guider.config[field])


def _set(guider: BaseGuidance, given: dict[str, Any]) -> None:
    """Give the guider the attributes that one built with these settings has: some settings only say how others are made (which layers, what dropout)."""
    for field, value in given.items():
        if isinstance(usual := guider.config.get(field), (bool, int, float)):
            check_value(field, value, bool if isinstance(usual, bool) else float)
    made = _made(type(guider), guider.config, given)
    for field, value in given.items():
        if (name := _attribute(guider, field)) in guider.__dict__:
            made.setdefault(name, value)
        elif not made and value != guider.config.get(field):
            raise ValueError(f"{type(guider).__name__} keeps no {field!r} for a call: give the pipeline a guider that has it, guider.new({field}=...).")
    guider.__dict__.update(made)


def _made(cls: type[BaseGuidance], config: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The attributes that a guider built with the settings `given` has otherwise than one without. Built once: diffusers warns of each guider."""
    key = (cls, repr(config), repr(sorted(given.items())))
    if key not in _BUILT:
        before, after = (cls.from_config(config, **own).__dict__ for own in ({}, given))
        _BUILT[key] = {name: value for name, value in after.items() if name != "_internal_dict" and before.get(name) != value}
    return copy.deepcopy(_BUILT[key])


_BUILT: dict[tuple, dict[str, Any]] = {}


def _copied(guider: BaseGuidance) -> BaseGuidance:
    """Copied with what it gathers, such as a momentum; networks that it holds are shared."""
    shared = {id(value): value for value in guider.__dict__.values() if isinstance(value, nn.Module)}
    return copy.deepcopy(guider, shared)


def _conditional(cls: type[BaseGuidance]) -> type[BaseGuidance]:
    """A guider of this class that takes the conditional prediction alone."""

    def first(prepare: Callable) -> Callable:
        return lambda self, *args, **kwargs: [batch for batch in prepare(self, *args, **kwargs) if batch[self._identifier_key] == "pred_cond"]

    def handed_on(self, data: list) -> GuiderOutput:
        return GuiderOutput(pred=data[0].noise_pred, pred_cond=data[0].noise_pred, pred_uncond=None)

    own = {"__call__": handed_on, "__module__": cls.__module__}
    return type(cls.__name__, (cls,), {**own, **{name: first(getattr(cls, name)) for name in _PREPARE}})


_SAID: WeakSet = WeakSet()


def _watched(pipeline, component: str, prepare: Callable, *args: Any, **kwargs: Any):
    """What the guider's `prepare` returns; said once for a pipeline if its two predictions are of the same inputs."""
    batches = prepare(*args, **kwargs)
    if pipeline not in _SAID and _same_inputs(batches, prepare.__self__._identifier_key):
        _SAID.add(pipeline)
        logger.warning(
            f"The {component} of this {type(pipeline).__name__} is on, but both of its predictions are of the same inputs, so that it guides by "
            'nothing and costs a second denoiser call: the pipeline encodes a negative prompt only where one is given. Give negative_prompt="".'
        )
    return batches


def _same_inputs(batches: list, key: str) -> bool:
    named = {batch[key]: {name: value for name, value in batch.as_dict().items() if name != key} for batch in batches}
    one, other = named.get("pred_cond"), named.get("pred_uncond")
    return one is not None and other is not None and all(other.get(name) is value for name, value in one.items())
