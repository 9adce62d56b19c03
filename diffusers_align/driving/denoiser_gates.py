"""Denoiser calls whose outcome nobody needs are gated: they return zeros of the right shape at no cost.

So a pipeline's own loop reaches any of its steps, with everything that depends on the step's index in place. What a denoiser returns is
learned from a real call. Which calls have the same kind of output must not depend on a process's prompts: sharded weights are
gathered in step, so each process makes the same number of real calls.

A call that does more than return numbers cannot be left out. One that hands out or fills a cache of keys and values, which later calls read, is made for
real, with its graph; so are, without, those of a denoiser into which the pipeline looks by hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import NoneType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from .module_tree import modules_of
from .replacements import replaced

# What each denoiser returns, by kind of call; None where zeros cannot stand for it. It goes when the denoiser does, and copies learn anew.
_OUTPUTS: WeakKeyDictionary[nn.Module, dict[tuple, Any]] = WeakKeyDictionary()


@contextmanager
def gated(module: nn.Module, is_open: Callable[[], bool]) -> Iterator[None]:
    """Context: while `is_open()` is False, calls of the module return zeros shaped like its real output for such a call (learned by one real
    call, if there was none, which is handed out without its graph)."""
    known = _OUTPUTS.setdefault(module, {})
    first_hook, found = RemovableHandle.next_id, []

    def looked_into() -> bool:
        if not found:
            found.append(is_looked_into(module, first_hook))
        return found[0]

    def gate(forward: Callable, *args: Any, **kwargs: Any):
        inputs = _tensors(args, kwargs)
        key = _kind_of_call(args, kwargs, inputs)
        if not is_open() and known.get(key) is not None:
            if looked_into():
                with torch.no_grad():
                    return forward(*args, **kwargs)
            return pytree.tree_map(lambda leaf: leaf.zeros(inputs) if type(leaf) is _Zeros else leaf, known[key], is_leaf=lambda x: type(x) is _Zeros)
        given = Given(args, kwargs) if key not in known else None
        output = forward(*args, **kwargs)
        if given is not None:
            known[key] = None if carries(output, given) else pytree.tree_map_only(Tensor, lambda x: _Zeros.like(x, inputs), output)
        return output if is_open() or known[key] is None else pytree.tree_map_only(Tensor, Tensor.detach, output)

    with replaced(module, "forward", gate):
        yield


def is_looked_into(module: nn.Module, first_hook: int) -> bool:
    """Whether somebody has put hooks inside the module since `RemovableHandle.next_id` was `first_hook`, as pipelines do in a call: it reads there what
    gated calls do not compute (its attention)."""
    return RemovableHandle.next_id > first_hook and any(key >= first_hook for part in modules_of(module) for key in part._forward_hooks)


NUMBERS = (Tensor, int, float, complex, str, NoneType, torch.dtype, torch.device, torch.Size)


class Given:
    """What a denoiser is handed beside tensors and numbers, such as a cache of keys and values, and what is in it before the call.

    Attributes:
        objects: the arguments that may be written into.
    """

    def __init__(self, args: tuple, kwargs: dict[str, Any]):
        self.objects = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if not isinstance(leaf, NUMBERS) and hasattr(leaf, "__dict__")]
        self._before = _contents(self.objects)

    @property
    def is_changed(self) -> bool:
        """Whether something else is in it now."""
        now = _contents(self.objects)
        return len(now) != len(self._before) or any(new is not old or version != was for (new, version), (old, was) in zip(now, self._before))


def carries(output: Any, given: Given) -> bool:
    """Whether a denoiser's call did more than return numbers: it handed out something else, or wrote into what it was given."""
    return given.is_changed or not all(isinstance(leaf, NUMBERS) for leaf in pytree.tree_leaves(output))


def _contents(objects: list[Any]) -> list[tuple[Any, int]]:
    """All that hangs below some objects, and how often each tensor was written to. Holding them keeps their identities apart."""
    found, left, seen = [], list(objects), set()
    while left:
        item = left.pop()
        found.append((item, item._version if isinstance(item, Tensor) and not item.is_inference() else 0))
        if isinstance(item, NUMBERS) or id(item) in seen:
            continue
        seen.add(id(item))
        left.extend(
            item.values() if isinstance(item, dict) else item if isinstance(item, (list, tuple)) else vars(item).values() if hasattr(item, "__dict__") else ()
        )
    return found


_Place = tuple[int | str, int]


def _tensors(args: tuple, kwargs: dict[str, Any]) -> dict[_Place, Tensor]:
    """The tensors of a call, by their argument and their number in it."""
    arguments = (*enumerate(args), *kwargs.items())
    return {(name, i): x for name, value in arguments for i, x in enumerate(pytree.tree_leaves(value)) if isinstance(x, Tensor)}


def _kind_of_call(args: tuple, kwargs: dict[str, Any], inputs: dict[_Place, Tensor]) -> tuple:
    """What the output's form depends on: the latents (the first argument), precisions, flags. Not the lengths of prompts, nor whether they need a
    mask, which differ between processes."""
    first = 0 if args else next(iter(kwargs))
    device = next((x.device.type for x in inputs.values()), "cpu")
    return (
        tuple((x.shape, x.dtype, x.device) for (name, _), x in inputs.items() if name == first),
        len(args),
        tuple(kwargs),
        tuple((name, value) for name, value in kwargs.items() if isinstance(value, (bool, str))),
        frozenset(x.dtype for x in inputs.values() if x.is_floating_point()),
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
    )


class _Zeros(NamedTuple):
    """Stands for a tensor of an output.

    Attributes:
        source: the tensor of the call that it is shaped like: a second modality has a size of its own. None if like none.
        shape, dtype, device: of the real output; the shape counts if the call has no such tensor.
    """

    source: _Place | None
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def like(cls, output: Tensor, inputs: dict[_Place, Tensor]) -> _Zeros:
        source = next((place for place, x in inputs.items() if x.shape == output.shape), None)
        return cls(source, output.shape, output.dtype, output.device)

    def zeros(self, inputs: dict[_Place, Tensor]) -> Tensor:
        shape = inputs[self.source].shape if self.source in inputs else self.shape
        return torch.zeros(shape, dtype=self.dtype, device=self.device)
