"""What a way back needs of a pipeline's own arithmetic is kept apart from what the pipeline writes into.

Between its networks a pipeline may compute with a tensor and write into it afterwards: it normalises the first frames of a video by the others, or a
picture by its own mean. Autograd then ends with "modified by an inplace operation". So copies are kept there. Networks, rewards and whatever else a
step's callback runs write into nothing that they need, and keep what they keep without copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from .replacements import replaced


def _kept(x: torch.Tensor) -> torch.Tensor:
    """A copy; weights, which no pipeline writes into, as they are."""
    return x if isinstance(x, nn.Parameter) else x.detach().clone()


class SavedApart:
    """Keeps copies, outside of what is called through `without`."""

    def __init__(self):
        self._hooks = torch.autograd.graph.saved_tensors_hooks(_kept, lambda x: x)
        self._inside = 1

    def without(self, call: Callable, *args: Any, **kwargs: Any):
        """The call, which keeps its tensors as they are."""
        self._go_in()
        try:
            return call(*args, **kwargs)
        finally:
            self._come_out()

    def _go_in(self) -> None:
        if self._inside == 0:
            self._hooks.__exit__()
        self._inside += 1

    def _come_out(self) -> None:
        self._inside -= 1
        if self._inside == 0:
            self._hooks.__enter__()

    @contextmanager
    def around(self, pipeline) -> Iterator[Callable[[Callable], Callable]]:
        """Context: a call of the pipeline keeps copies, but for its networks. What it gives makes a callback that is like those."""
        with ExitStack() as stack:
            for network in pipeline.components.values():
                for name in ("forward", "encode", "decode"):
                    if isinstance(network, nn.Module) and hasattr(network, name):
                        stack.enter_context(replaced(network, name, self.without))
            self._come_out()
            stack.callback(self._go_in)
            yield lambda callback: lambda *args: self.without(callback, *args)
