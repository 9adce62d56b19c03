"""What stands in the place of something that a pipeline, a model or a scheduler has, for the time of a call, and leaves no trace.

Methods and attributes that a call changes are changed here; a scheduler's class, taken-off wrappers and probed tensors where they are needed.
`docs/patches.md` lists all changes, with what breaks each of them.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import CodeType, FunctionType, MethodType
from typing import Any


class InPlace:
    """`call(original, ...)` in the place of a method, such as a module's `forward`. Deep copies and pickles of its owner get the original."""

    def __init__(self, call: Callable, original: Callable):
        functools.update_wrapper(self, original)  # its signature and name
        self._call, self._original = call, original

    def __call__(self, *args: Any, **kwargs: Any):
        return self._call(self._original, *args, **kwargs)

    def __reduce__(self):
        return _itself, (self._original,)


def _itself(method: Callable) -> Callable:
    return method


@contextmanager
def held(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Context: `owner.name` is `value`, for this object alone. Classes, other objects and a pipeline's config do not see it."""
    own = owner.__dict__
    had, before = name in own, own.get(name)
    own[name] = value
    try:
        yield
    finally:
        if had:
            own[name] = before
        else:
            own.pop(name, None)


@contextmanager
def replaced(owner: Any, name: str, call: Callable) -> Iterator[None]:
    """Context: `owner.name(...)` is `call(original, ...)`, for this object alone.

    Args:
        call: gets the method that it stands for, and that one's arguments.
    """
    with held(owner, name, InPlace(call, getattr(owner, name))):
        yield


def with_globals(function: Callable, **names: Any) -> Callable:
    """A copy of a function or a bound method that finds these objects under the global names; its module, which other threads run, stays as it is."""
    plain = getattr(function, "__func__", function)
    copied = FunctionType(plain.__code__, {**plain.__globals__, **names}, plain.__name__, plain.__defaults__, plain.__closure__)
    copied.__kwdefaults__ = plain.__kwdefaults__
    return MethodType(copied, function.__self__) if isinstance(function, MethodType) else copied


def reads_global(code: CodeType, name: str) -> bool:
    """Whether a function's code, or that of a function inside it, reads the global `name`."""
    return name in code.co_names or any(reads_global(part, name) for part in code.co_consts if isinstance(part, CodeType))


def has_constant(code: CodeType, value: Any) -> bool:
    """Whether a function's code, or that of a function inside it, has `value` as a constant or in a tuple of them."""
    inside = (value in part if isinstance(part, tuple) else isinstance(part, CodeType) and has_constant(part, value) for part in code.co_consts)
    return value in code.co_consts or any(inside)


def reads_levels_by_number(functions: Iterable[FunctionType]) -> bool:
    """Whether a pipeline's call looks the noise level up by the number of its own step, `scheduler.sigmas[i]`, which is another one's where steps are
    repeated. What it hands to a callback does not count."""
    return any(map(_reads_by_number, functions))


@functools.lru_cache(maxsize=1024)
def signature_of(function: Callable) -> inspect.Signature:
    """`inspect.signature` of a class's function, which takes as long as a small layer and is asked for in each call."""
    return inspect.signature(function)


@functools.cache
def source_of(function: FunctionType) -> ast.AST | None:
    """A function's syntax tree; None where its source is not there."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None


@functools.cache
def _reads_by_number(function: FunctionType) -> bool:
    tree = source_of(function)
    if tree is None:  # an index beyond the table is met on the way
        return False
    for_callbacks = {id(node) for test in ast.walk(tree) if isinstance(test, ast.If) and "callback" in ast.unparse(test.test) for node in ast.walk(test)}
    lookups = (node for node in ast.walk(tree) if isinstance(node, ast.Subscript) and id(node) not in for_callbacks)
    return any(
        isinstance(lookup.value, ast.Attribute) and lookup.value.attr == "sigmas" and any(isinstance(part, ast.Name) for part in ast.walk(lookup.slice))
        for lookup in lookups
    )
