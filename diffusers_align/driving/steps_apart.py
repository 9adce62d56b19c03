"""Steps whose graphs hang together: what a pipeline carries from one step to the next (the momentum of its guidance, keys and values, an embedding
made before the first step) may have a graph, and `backward` at one step then frees a part of the next one's.

Such pipelines are found by the graphs of the first two steps, and walked once for each step: the denoiser's outputs before that step come from the
walks before, without a graph. So the denoiser is called as often as in one walk, memory stays one step's, and what the pipeline carries has its value
but no gradient. What the denoiser itself carries (a call that hands out or fills a cache) is made anew in each walk, with its graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .denoiser_gates import Given, carries


class SharedGraph(BaseException):
    """Ends a walk at a step whose graph is in part that of the step before. Not an Exception: a pipeline may catch those."""


class GraphOfSteps:
    """Looks at the graphs of the first two steps that are handed out."""

    def __init__(self):
        self._first: set | None = None
        self.known = False

    def look(self, x: Tensor) -> None:
        """Raise `SharedGraph` if `x`, the second one, shares a part of its graph with the first one; the weights' own ends are no part of it."""
        if self.known:
            return
        nodes = _nodes(x)
        if self._first is None:
            self._first = nodes
            return
        shared, self._first, self.known = not nodes.isdisjoint(self._first), None, True
        if shared:
            raise SharedGraph


def _nodes(x: Tensor) -> set:
    """The operations that made `x` and have a derivative, as torch's graph has them. Holding them keeps their identities apart."""
    found, left = set(), [x.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in found and not hasattr(node, "variable"):  # which the ends at weights have
            found.add(node)
            left.extend(following for following, _ in node.next_functions)
    return found


class Recalled:
    """The outputs of a pipeline's denoisers in walks of the same call, by solver step: `call` stands in for their `forward`.

    Attributes:
        wanted: the solver step whose calls have a graph in this walk.
        step: the one at which the walk is.
    """

    def __init__(self):
        self.wanted = self.step = 0
        self._outputs: dict[int, list[Any]] = {}
        self._number = 0

    def begin(self, wanted: int) -> None:
        """A new walk."""
        self.wanted, self.step, self._number = wanted, 0, 0

    def needs_denoiser(self, step: int) -> bool:
        """For the driver: real calls up to the wanted step."""
        if step != self.step:
            self.step, self._number = step, 0
        return step <= self.wanted

    def call(self, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        outputs, number = self._outputs.setdefault(self.step, []), self._number
        self._number += 1
        if self.step < self.wanted and number < len(outputs) and outputs[number] is not None:
            return _copied(outputs[number])
        given, first = Given(args, kwargs), number == len(outputs)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.step <= self.wanted):
            output = forward(*args, **kwargs)
        if self.step > self.wanted or not first:
            return output
        outputs.append(None if carries(output, given) else _copied(output))
        return output if self.step == self.wanted or outputs[-1] is None else _copied(output)


def _copied(output: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), output)
