"""A modular pipeline's blocks for one call: copies that have gradients, no progress bars, and places to stand in between.

Blocks are shared: diffusers keeps some of them in their class, so that all pipelines of a kind run the very same object. So a call gets copies,
whose classes are run-time subclasses. `torch.no_grad` around and inside a block's methods has no effect in them; the driver says by
autograd's own mode whether a call has gradients.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import FunctionType
from typing import Any

import torch
from diffusers import ModularPipelineBlocks

from .replacements import reads_global, with_globals

Around = Callable[..., Any]


class _Torch:
    """torch, in which `no_grad` and `inference_mode` do nothing, as context or as decorator."""

    def __getattr__(self, name: str) -> Any:
        return _Nothing if name in ("no_grad", "inference_mode") else getattr(torch, name)


class _Nothing(nullcontext):
    def __init__(self, *_: Any):
        super().__init__()

    def __call__(self, function: Callable) -> Callable:
        return function


class _Quiet:
    """A logger without errors: what a block raises comes through, and diffusers would print the traceback once for each block around it."""

    def __init__(self, logger):
        self._logger = logger

    def error(self, *_args: Any, **_kwargs: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return getattr(self._logger, name)


TORCH = _Torch()


def undecorated(method: Callable, **names: Any) -> Callable:
    """A copy of a function without decorators, in which `torch.no_grad` does nothing and these global `names` are replaced; the function itself if
    nothing of it would change."""
    plain = inspect.unwrap(method)
    code, own = plain.__code__, {name: value for name, value in names.items() if reads_global(plain.__code__, name)}
    if reads_global(code, "no_grad") or reads_global(code, "inference_mode"):
        own["torch"] = TORCH
    if "logger" in plain.__globals__ and reads_global(code, "logger") and reads_global(code, "error"):
        own["logger"] = _Quiet(plain.__globals__["logger"])
    return with_globals(plain, **own) if own else plain


def _nothing(*_: Any) -> None: ...


def own_blocks(
    block: ModularPipelineBlocks, around: Callable[[ModularPipelineBlocks], Around | None] = _nothing, globals_of: Callable[[dict], dict] = lambda _: {}
) -> ModularPipelineBlocks:
    """A copy of a tree of blocks.

    Args:
        around: of each block, what is called in its place, `call(run, components, state, **kwargs)`; None for the block itself.
        globals_of: of the globals of a block's module, those that its methods find in their place.
    """
    copied = copy.copy(block)
    if block.sub_blocks:
        copied.sub_blocks = type(block.sub_blocks)((name, own_blocks(part, around, globals_of)) for name, part in block.sub_blocks.items())
    copied.__class__ = _own_class(type(block), around(block), globals_of)
    copied._progress_bar_config = {**getattr(block, "_progress_bar_config", {}), "disable": True}
    return copied


def _own_class(cls: type, call: Around | None, globals_of: Callable[[dict], dict]) -> type:
    methods: dict[str, Any] = {"__module__": cls.__module__}
    for base in reversed(cls.__mro__[: cls.__mro__.index(ModularPipelineBlocks)]):
        for name, member in vars(base).items():
            function = member.__func__ if isinstance(member, staticmethod) else member
            if isinstance(function, FunctionType) and name != "__init__":
                own = undecorated(function, **globals_of(inspect.unwrap(function).__globals__))
                methods[name] = staticmethod(own) if isinstance(member, staticmethod) else own
    if call is not None:
        run = methods["__call__"]
        methods["__call__"] = lambda self, *args, **kwargs: call(lambda *args, **kwargs: run(self, *args, **kwargs), *args, **kwargs)
    return type(cls.__name__, (cls,), methods)


def leaves(block: ModularPipelineBlocks) -> Iterator[ModularPipelineBlocks]:
    """The blocks at the ends of a tree."""
    if not block.sub_blocks:
        yield block
    for part in block.sub_blocks.values():
        yield from leaves(part)
