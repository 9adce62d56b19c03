"""Functions with one thing wrong, by their source: what a test of the right one must tell apart."""

from __future__ import annotations

import inspect
from collections.abc import Callable


def mutated(function: Callable, old: str, new: str) -> Callable:
    """`function` with `new` in the place of `old`, which its source has once."""
    source = inspect.getsource(function)
    assert source.count(old) == 1, f"{function.__name__} has {source.count(old)} of {old!r}"
    names = dict(function.__globals__)
    exec(compile(source.replace(old, new), f"mutant of {function.__name__}", "exec"), names)
    return names[function.__name__]


def assert_mutants_fail(check: Callable[[Callable], None], function: Callable, mutations: dict[str, str]) -> None:
    """`check` passes with `function` and with none of its mutants."""
    check(function)
    for old, new in mutations.items():
        assert not _passes(check, mutated(function, old, new)), f"{function.__name__} passes with {new!r} in the place of {old!r}"


def _passes(check: Callable[[Callable], None], function: Callable) -> bool:
    try:
        check(function)
    except (AssertionError, IndexError, RuntimeError):
        return False
    return True
