"""The rows of a denoiser's calls: calls joined to one of all their rows, a call of some of its rows, and what comes out put in place again.

What belongs to rows shows in its form. The first argument has a row for each of them, as a tensor or as a list; so have tensors of as many rows, and lists of
as many things. A time that all rows share is repeated for those of each call. What is left must be the same in all calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .denoiser_gates import NUMBERS, Given

Index = list[int]


class Call:
    """What a denoiser is called with.

    Attributes:
        rows: how many it evaluates.
    """

    def __init__(self, args: tuple, kwargs: dict[str, Any]):
        # Containers are copied: a denoiser may use up the lists that it is given.
        self.args, self.kwargs = pytree.tree_map(lambda leaf: leaf, (args, kwargs))
        first = args[0] if args else next(iter(kwargs.values()))
        self._lists, self.rows = isinstance(first, list), len(first)
        self.leaves, self.form = pytree.tree_flatten((self.args, self.kwargs), is_leaf=self._is_list_of_rows)

    def _is_list_of_rows(self, value: Any) -> bool:
        if type(value) is not list or len(value) != self.rows:
            return False
        return self._lists or not any(_has_rows(item, self.rows) for item in value)

    def of(self, leaves: list[Any]) -> Call:
        """The same call with other arguments, in the order of `leaves`."""
        return Call(*pytree.tree_unflatten(leaves, self.form))

    def take(self, index: Index) -> Call:
        """The call of some of the rows."""
        return self.of([_taken(leaf, index, self.rows) for leaf in self.leaves])

    def is_like(self, other: Call) -> bool:
        """Whether the two have equal forms, so that they may be joined."""
        return self.form == other.form and self.rows == other.rows and all(_shape(a) == _shape(b) for a, b in zip(self.leaves, other.leaves))

    def is_same(self, other: Call) -> bool:
        """Whether all arguments are equal."""
        return self.is_like(other) and all(_same(a, b) for a, b in zip(self.leaves, other.leaves))

    def ask(self, forward: Callable) -> Any:
        """What `forward` makes of it."""
        return forward(*self.args, **self.kwargs)


def joined(calls: list[Call]) -> Call:
    """One call of the rows of all calls, those of the first one first.

    Raises:
        ValueError: they differ in what belongs to no row, or hand on what may be written into (a cache).
    """
    first = calls[0]
    if any(Given(call.args, call.kwargs).objects for call in calls):
        raise ValueError("its denoiser is handed a cache, which goes from step to step")
    if not all(call.is_like(first) for call in calls):
        raise ValueError("its denoiser is called in several forms")
    return first.of([_joined(list(leaves), first.rows) for leaves in zip(*(call.leaves for call in calls))])


def parted(output: Any, rows: int, number: int) -> list[Any]:
    """What a joint call of `number` calls of so many rows each returned, as each of them would have."""
    leaves, form = flat_output(output, rows * number)
    own = [list(range(i * rows, (i + 1) * rows)) for i in range(number)]
    return [pytree.tree_unflatten([_taken(leaf, index, rows * number) for leaf in leaves], form) for index in own]


def put_together(parts: list[tuple[Index, Any]], rows: int) -> Any:
    """What a call of so many rows returns, from what calls of some of them returned, each with the numbers of its rows."""
    flat = [flat_output(output, len(index)) for index, output in parts]
    place = torch.tensor([i for index, _ in parts for i in index]).argsort().tolist()

    def together(*leaves: Any) -> Any:
        if isinstance(leaves[0], list):
            rows_of_all = [item for leaf in leaves for item in leaf]
            return [rows_of_all[i] for i in place]
        if all(_has_rows(leaf, len(index)) for leaf, (index, _) in zip(leaves, parts)):
            return torch.cat(leaves)[place]
        return leaves[0]

    return pytree.tree_unflatten([together(*leaves) for leaves in zip(*(leaves for leaves, _ in flat))], flat[0][1])


def flat_output(output: Any, rows: int) -> tuple[list[Any], Any]:
    """What a call of so many rows returned, as leaves (tensors, lists of one thing a row) and the form that `tree_unflatten` takes."""
    return pytree.tree_flatten(output, is_leaf=lambda value: type(value) is list and len(value) == rows)


def _has_rows(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == rows


def _taken(leaf: Any, index: Index, rows: int) -> Any:
    if isinstance(leaf, list):
        return [leaf[i] for i in index]
    if not _has_rows(leaf, rows):
        return leaf
    consecutive = index == list(range(index[0], index[0] + len(index)))
    return leaf[index[0] : index[0] + len(index)] if consecutive else leaf[index]


def _shape(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else type(leaf)


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return isinstance(a, (*NUMBERS, tuple, bool)) and type(a) is type(b) and not isinstance(a, Tensor) and a == b


def _joined(leaves: list[Any], rows: int) -> Any:
    first = leaves[0]
    if isinstance(first, list):
        return [item for leaf in leaves for item in leaf]
    if _has_rows(first, rows):
        return torch.cat(leaves)
    if all(_same(first, leaf) for leaf in leaves):
        return first
    if isinstance(first, Tensor) and first.numel() == 1:
        return torch.cat([leaf.reshape(1).expand(rows) for leaf in leaves])
    raise ValueError("its denoiser is told something of each step that is neither a row's nor a time")
