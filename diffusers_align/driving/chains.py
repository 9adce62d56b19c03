"""Calls whose scheduler walks several chains of states one after the other: the stages of a pyramid, the windows of a long video, an upsampling behind it.

The last state of one chain alone makes a sample; of several, those of all chains do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .scheduler_hook import Step

# By (scheduler, chain), the states (B, *D) behind the last step.
Finals = dict[tuple[int, int], Tensor]

SEVERAL_CHAINS = (
    "The pipeline's steps are several chains of states one after the other (sizes, windows, an upsampling behind), and the state of one of them makes no "
    "sample: {} need one chain. Let the call make one (fewer frames, a single stage) if it can, or choose the best of n: BestOfNPipeline(pipe)."
)

OTHER_SIZE = (
    "The pipeline's states change their size on the way, from {} to {} (the stages of a pyramid, an upsampling behind): there is no one chain of states "
    "to learn on. Use a pipeline that makes one of the sizes, or choose the best of n: BestOfNPipeline(pipe)."
)


class Chains:
    """Says of each step of a call in turn which chain it belongs to: another one begins with another schedule, where states have another size, or where
    time turns round."""

    def __init__(self):
        self._last: dict[int, tuple[float, torch.Size, int]] = {}
        self._way: dict[int, float] = {}
        self._number: dict[int, int] = {}

    def of(self, step: Step) -> tuple[int, int]:
        """The scheduler (0: the pipeline's own) and the number of its chain, both from 0."""
        child, time, shape = step.child, step.time, step.sample.shape
        before, was, portion = self._last.get(child, (time, shape, step.portion))
        way = self._way.get(child, 0.0)
        if shape != was or portion != step.portion or (time - before) * way < 0:
            self._number[child] = self._number.get(child, 0) + 1
            self._way.pop(child, None)
        elif way == 0:
            self._way[child] = time - before
        self._last[child] = time, shape, step.portion
        return child, self._number.get(child, 0)


class Recorder:
    """Runs the steps of a call, and keeps the final states of its chains, a row for each output; an `on_step`.

    Args:
        number: how many outputs the call makes.
    """

    def __init__(self, number: int):
        self.number = number
        self._chains = Chains()
        self._copies: dict[tuple[int, int], bool] = {}
        self._last: Finals = {}

    def __call__(self, step: Step) -> None:
        chain = self._chains.of(step)
        if chain not in self._copies:
            blocks = step.sample.split(self.number)
            self._copies[chain] = all(torch.equal(blocks[0], block) for block in blocks[1:])
        self._last[chain] = step.run().prev_sample

    @property
    def finals(self) -> Finals:
        """The final states (B, *D), or (B, F, *D) where each output has F rows of its own, its frames.

        Raises:
            ValueError: no scheduler took a step, or the rows do not go with the outputs.
        """
        if not self._last:
            raise ValueError("The pipeline took no step of a scheduler: num_inference_steps or strength asks for none.")
        return {chain: self._by_output(state, self._copies[chain]) for chain, state in self._last.items()}

    def _by_output(self, state: Tensor, copies: bool) -> Tensor:
        if len(state) % self.number:
            raise ValueError(f"The pipeline's steps are of {len(state)} samples, its call of {self.number} outputs: give it one prompt a call.")
        if copies and all(torch.equal(state[: self.number], block) for block in state.split(self.number)):
            return state[: self.number]  # the rows of a batch that is walked twice for guidance
        return state.reshape(self.number, -1, *state.shape[1:]) if len(state) > self.number else state


def put_state(chains: Chains, step: Step, finals: Mapping[tuple[int, int], Tensor], what: str) -> Tensor:
    """Leave the step out, and what follows it in the place of its outcome: its chain's final state, as `Recorder.finals` has it.

    Args:
        what: whose states they are, for the message.

    Raises:
        ValueError: the step is of a chain of which there is none.
    """
    key = chains.of(step)
    if key not in finals:
        raise ValueError(SEVERAL_CHAINS.format(what))
    step.skip()
    state, rows = finals[key], step.sample
    if state.ndim > rows.ndim:
        state = state.flatten(0, 1)
    elif len(state) < len(rows):
        state = state.repeat(len(rows) // len(state), *[1] * (state.ndim - 1))
    return step.like(state)
