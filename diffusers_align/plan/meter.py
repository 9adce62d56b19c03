"""What a piece of work takes: bytes at its peak, bytes that autograd keeps, floating-point operations. The same meter measures fake and real tensors.

Every operation's new storages are counted until they are freed. What a kernel allocates for itself and gives back is not seen (a convolution's
workspace), nor is an allocator's rounding.
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_CPU_ATTENTION = "scaled_dot_product_flash_attention_for_cpu"


@dataclass
class Work:
    """Of a piece of work.

    Attributes:
        peak: most bytes at a time above what there was before.
        kept: most bytes at a time of what was made that autograd kept for the way back. Checkpoints keep their inputs elsewhere.
        left: bytes of it that are still there at its end.
        flops: floating-point operations of matrix products, convolutions and attention; an addition and a multiplication are two.
        rows: samples through each denoiser: without gradients, with.
        peaks: `peak` of the models that were run, by component, what was there outside included.
    """

    peak: int = 0
    kept: int = 0
    left: int = 0
    flops: int = 0
    rows: Counter[bool] = field(default_factory=Counter)
    peaks: dict[str, int] = field(default_factory=dict)


class Meter:
    """Measures one `Work` at a time; without any, nothing."""

    def __init__(self):
        self.work: Work | None = None
        self.model: str | None = None
        self._live = self._kept = 0
        self._seen: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
        self._saved: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._top: _Watch | None = None

    @contextmanager
    def measure(self) -> Iterator[Work]:
        """Context: a `Work`, complete at its end."""
        self.work, self._live, self._kept = Work(), 0, 0
        self._seen, self._saved = weakref.WeakKeyDictionary(), weakref.WeakKeyDictionary()
        try:
            with self.watch(), torch.autograd.graph.saved_tensors_hooks(lambda x: _Saved(self, x), lambda saved: saved.tensor):
                yield self.work
            gc.collect()  # what nothing refers to any more is gone, however long the collector would have waited
            self.work.left = self._live
        finally:
            self.work = None

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Context: operations of the modes that were entered before are seen, by this watch alone."""
        before, self._top = self._top, _Watch(self)
        try:
            with self._top:
                yield
        finally:
            self._top = before

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Context: what is made is not counted."""
        before, self._top = self._top, None
        try:
            yield
        finally:
            self._top = before

    @contextmanager
    def part(self) -> Iterator[Work]:
        """Context: the `peak` and the `flops` of a part of what is measured, complete at its end."""
        found, whole, live = Work(), self.work, self._live
        peak, operations, whole.peak = whole.peak, whole.flops, live
        try:
            yield found
        finally:
            found.peak, found.flops = whole.peak - live, whole.flops - operations
            whole.peak = max(peak, whole.peak)

    def again(self, part: Work) -> None:
        """A part is done again, and not walked; nothing of it is left."""
        self.work.flops += part.flops
        self._reach(self._live + part.peak)

    def _reach(self, live: int) -> None:
        self.work.peak = max(self.work.peak, live)
        if self.model is not None:
            self.work.peaks[self.model] = max(self.work.peaks.get(self.model, 0), live)

    def saw(self, function: Any, inputs: Any, kwargs: dict[str, Any], output: Any) -> None:
        """An operation was done."""
        made = {x.untyped_storage() for x in pytree.tree_leaves(output) if isinstance(x, Tensor)}
        given = {x.untyped_storage() for x in pytree.tree_leaves((inputs, kwargs)) if isinstance(x, Tensor)}
        for storage in given:  # of before the measurement
            self._seen.setdefault(storage, False)
        for storage in made:
            if storage not in self._seen:
                self._seen[storage] = True
                self._live += storage.nbytes()
                weakref.finalize(storage, self._freed, self.work, storage.nbytes())
        self._reach(self._live)
        self.work.flops += flops(function, inputs, kwargs, output)

    def _freed(self, work: Work, size: int) -> None:
        if work is self.work:
            self._live -= size

    def is_new(self, tensor: Tensor) -> bool:
        """Whether the tensor was made within the measurement: weights were not."""
        return self._seen.get(tensor.untyped_storage(), False)

    def keep(self, storage: Any, sign: int) -> None:
        """Autograd has saved a tensor of this storage, or given it up."""
        before = self._saved.get(storage, 0)
        self._saved[storage] = now = before + sign
        self._kept += storage.nbytes() * ((now > 0) - (before > 0))
        self.work.kept = max(self.work.kept, self._kept)


class _Saved:
    """A tensor that autograd keeps."""

    def __init__(self, meter: Meter, tensor: Tensor):
        self.tensor, self.meter, self.work = tensor, meter, meter.work
        self.counts = self.work is not None and meter.is_new(tensor)
        if self.counts:
            meter.keep(tensor.untyped_storage(), 1)

    def __del__(self):
        if self.counts and self.meter.work is self.work:
            self.meter.keep(self.tensor.untyped_storage(), -1)


class _Watch(TorchDispatchMode):
    def __init__(self, meter: Meter):
        super().__init__()
        self.meter = meter

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        output = function(*args, **(kwargs or {}))
        if self.meter._top is self and self.meter.work is not None:
            self.meter.saw(function, args, kwargs or {}, output)
        return output


def flops(function: Any, args: Any, kwargs: dict[str, Any], output: Any) -> int:
    """Floating-point operations of one operation; 0 of those that are none of the costly ones."""
    packet = getattr(function, "overloadpacket", function)
    if _CPU_ATTENTION in str(packet):  # of which torch has no formula
        backward = str(packet).endswith("backward")
        return sdpa_backward_flop_count(*(x.shape for x in args[:4])) if backward else sdpa_flop_count(*(x.shape for x in args[:3]))
    return flop_registry[packet](*args, **kwargs, out_val=output) if packet in flop_registry else 0
