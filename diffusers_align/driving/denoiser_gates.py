"""Denoiser calls whose outcome nobody needs are gated: they return zeros of the right shape at no cost.

So a pipeline's own loop reaches any of its steps, with everything that depends on the step's index in place. What a denoiser returns is
learned from a real call. Which calls have the same kind of output must not depend on a process's prompts: sharded weights are
gathered in step, so each process makes the same number of real calls.
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

from .replacements import replaced

# What each denoiser returns, by kind of call; None where zeros cannot stand for it. It goes when the denoiser does, and copies learn anew.
_OUTPUTS: WeakKeyDictionary[nn.Module, dict[tuple, Any]] = WeakKeyDictionary()


@contextmanager
def gated(module: nn.Module, is_open: Callable[[], bool]) -> Iterator[None]:
    """Context: while `is_open()` is False, calls of the module return zeros shaped like its real output for such a call (learned by one real
    call without gradient if there was none)."""
    known = _OUTPUTS.setdefault(module, {})

    def gate(forward: Callable, *args: Any, **kwargs: Any):
        inputs = _tensors(args, kwargs)
        key = _kind_of_call(args, kwargs, inputs)
        if is_open():
            output = forward(*args, **kwargs)
        elif known.get(key) is not None:
            return pytree.tree_map(lambda leaf: leaf.zeros(inputs) if type(leaf) is _Zeros else leaf, known[key], is_leaf=lambda x: type(x) is _Zeros)
        else:
            with torch.no_grad():
                output = forward(*args, **kwargs)
        if key not in known:
            # A denoiser that returns more than numbers (a cache of keys and values) is called for real every time.
            known[key] = pytree.tree_map_only(Tensor, lambda x: _Zeros.like(x, inputs), output) if is_plain(output) else None
        return output

    with replaced(module, "forward", gate):
        yield


def is_plain(output: Any) -> bool:
    """Whether a denoiser's output is made of tensors and numbers alone."""
    return all(isinstance(leaf, (Tensor, int, float, bool, str, NoneType)) for leaf in pytree.tree_leaves(output))


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
