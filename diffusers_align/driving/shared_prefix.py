"""Steps that several samples of a call have in common, walked once: those before the first noise, where prompt and initial noise are equal.

Samples of a group that share their initial noise differ from the first step on that draws. Where an SDE window begins later, the denoiser would see the
same states over and over before it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..condition import Condition
from .pipeline_state import Enough
from .scheduler_hook import Step

if TYPE_CHECKING:
    from .driver import Driver
    from .tape import Tape


def shared_walk(driver: Driver, condition: Condition, tape: Tape) -> tuple[Callable[[Step], Tensor | None], Callable[[int], bool] | None]:
    """What `drive` needs for walking a condition's samples and recording them on the tape: an `on_step` and, where the first steps are shared,
    `needs_denoiser`."""
    prefix = _SharedPrefix(driver, condition)
    return (prefix.record(tape), prefix.needs_denoiser) if prefix.length else (tape.record, None)


class _SharedPrefix:
    """The first steps of a condition's samples, by those of them that differ.

    Attributes:
        length: steps before the first noise; 0 where nothing is shared.
    """

    def __init__(self, driver: Driver, condition: Condition):
        rows = [_row(condition, i) for i in range(len(condition))]
        different = list(dict.fromkeys(rows))
        self.index = torch.tensor([different.index(row) for row in rows])
        self.actions: dict[tuple[int, int], Tensor] = {}
        window = getattr(driver.scheduler.config, "sde_window", None)
        # In lockstep every process makes equally many calls, whatever its own rows.
        shared = bool(window) and window[0] > 0 and not driver.lockstep and len(different) < len(rows) and condition.seeds is not None
        self.length = _steps_before_noise(driver, condition.select([0])) if shared else 0
        if self.length:
            self._walk(driver, condition.select([rows.index(row) for row in different]))

    def needs_denoiser(self, k: int) -> bool:
        """Whether solver step k is each sample's own."""
        return k >= self.length

    def record(self, tape: Tape) -> Callable[[Step], Tensor | None]:
        """An `on_step` that takes the shared steps from here and runs the others, and records all of them on the tape."""

        def on_step(step: Step) -> Tensor | None:
            if self.needs_denoiser(step.k):
                return tape.record(step)
            state, action = step.sample.detach().clone(), step.like(self.actions[step.child, step.k][self.index])
            step.skip()
            tape.add(step, state, action.detach().clone(), None)
            return action

        return on_step

    def _walk(self, driver: Driver, condition: Condition) -> None:
        def on_step(step: Step) -> None:
            if step.k >= self.length:
                raise Enough
            self.actions[step.child, step.k] = step.run().prev_sample.detach().clone()

        _until_enough(driver, condition, on_step, needs_denoiser=lambda k: k < self.length)


def _row(condition: Condition, i: int) -> tuple:
    """What decides a sample's first steps: equal where they are."""
    own = condition.select([i])
    return own.prompts[0], own.seeds and own.seeds[0], *(f"{name}={_identity(value)}" for name, value in sorted(own.per_sample.items()))


def _identity(value: Any) -> str:
    """What is equal for equal numbers and texts, and for one and the same object otherwise."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)}{value.detach().cpu().flatten().tolist()}"
    if isinstance(value, np.ndarray):
        return f"{value.shape}{value.tobytes()!r}"
    return repr([item if isinstance(item, (str, int, float, bool, type(None))) else id(item) for item in value])


def _steps_before_noise(driver: Driver, condition: Condition) -> int:
    """How many steps a call takes before the first that draws, seen without its denoisers; 0 if none draws."""
    found: list[int] = []

    def look(step: Step) -> Tensor:
        if step.child == 0 and bool((step.run(prev_sample=step.sample).std > 0).any()):
            found.append(step.k)
            raise Enough
        return step.sample

    _until_enough(driver, condition, look, needs_denoiser=lambda k: False)
    return found[0] if found else 0


def _until_enough(driver: Driver, condition: Condition, on_step: Callable[[Step], Tensor | None], **options: Any) -> None:
    with suppress(Enough), torch.no_grad(), driver.noise(condition, deterministic=False):
        driver.drive(condition, on_step, **options)
