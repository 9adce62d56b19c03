"""Pictures for rewards and gradients pass no safety checker: it blackens some, and what a reward then sees is not what the model drew."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

from diffusers.utils import logging

from .replacements import held

logger = logging.get_logger(__name__)

COMPONENT = "safety_checker"
_SAID: WeakSet = WeakSet()


class _Passes:
    """Stands in for a checker that the pipeline asks for verdicts by name and will not begin without: every text and picture passes.

    It is gone when the pipeline has moved it to the device for the text and away again: pictures then keep their gradient, which ends where NumPy
    arrays are made for a checker.
    """

    def __init__(self, original: Any, pipeline: Any):
        self._original, self._pipeline, self._moved = original, pipeline, False

    def to(self, *_args: Any, **_kwargs: Any) -> _Passes:
        if self._moved:
            self._pipeline.__dict__[COMPONENT] = None
        self._moved = True
        return self

    def __getattr__(self, name: str):
        if name.startswith("check_text"):
            return lambda *_args, **_kwargs: True
        if name.startswith("check_"):
            return lambda frames, *_args, **_kwargs: frames
        return getattr(self._original, name)


def _stand_in(checker: Any, pipeline: Any) -> Any:
    """None, which pipelines that hand all pictures to `checker(...)` understand, or an object for those that call its `check_...`."""
    asked_by_name = any(name.startswith("check_") for name, _ in inspect.getmembers(type(checker), callable))
    return _Passes(checker, pipeline) if asked_by_name else None


@contextmanager
def unchecked(pipeline) -> Iterator[None]:
    """Context: the pipeline without its safety checker, if it has one; it is back afterwards. The first time is said."""
    checker = pipeline.__dict__.get(COMPONENT)
    if checker is None or isinstance(checker, _Passes):
        yield
        return
    if pipeline not in _SAID:
        _SAID.add(pipeline)
        logger.warning(
            f"The safety_checker of this {type(pipeline).__name__} is left out wherever pictures are sampled for training or scoring: a reward would "
            "judge the black picture that it puts in the place of one. The pipeline has it back after each call."
        )
    with held(pipeline, COMPONENT, _stand_in(checker, pipeline)):
        yield
