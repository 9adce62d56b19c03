"""Steps whose graphs hang together: what a pipeline carries from one step to the next (the momentum of its guidance, keys and values, an embedding
made before the first step) may have a graph, and `backward` at one step then frees a part of the next one's.

Such pipelines are found by the graphs of a first walk, and walked once for each step: the denoiser's outputs before that step come from the
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
    """Ends a walk at a step whose graph is in part that of one before. Not an Exception: a pipeline may catch those."""


class GraphOfSteps:
    """Looks at the graphs of the steps that are handed out, one after the other. What is carried may be read late only: a guider gathers its momentum from
    the first step on, and goes by it after some."""

    def look(self, x: Tensor) -> None:
        """Raise `SharedGraph` if `x` shares a part of its graph with one that was looked at before; the weights' own ends are no part of it.

        Each operation is marked in its own notes: to hold them would hold their activations where nobody calls `backward`.
        """
        seen, left = set(), [x.grad_fn]
        while left:
            node = left.pop()
            if node is None or node in seen or hasattr(node, "variable"):  # which the ends at weights have
                continue
            if self in node.metadata:
                raise SharedGraph
            seen.add(node)
            left.extend(following for following, _ in node.next_functions)
        for node in seen:
            node.metadata[self] = True


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
