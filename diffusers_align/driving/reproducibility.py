"""What replays stand on: a call that is made again is the same call, and a step by itself is that of the whole pass."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from typing import TYPE_CHECKING

import torch
from diffusers.utils import logging
from torch import Tensor

from ..trajectory import Trajectory
from .module_tree import caches
from .of_driver import OfDriver
from .pipeline_state import Enough
from .scheduler_hook import Step
from .tape import force, kind_of_call

if TYPE_CHECKING:
    from .driver import Driver

logger = logging.get_logger(__name__)


@torch.no_grad()
def check_first_steps(driver: Driver, trajectory: Trajectory, steps: int = 2) -> None:
    """Walk the first `steps` solver steps of a fresh roll-out again, with the same seeds and weights, and compare. Costs as many denoiser calls.

    Raises:
        ValueError: they differ: the pipeline draws noise that no seed fixes, or writes into its arguments. Differences of rounding are a warning.
    """
    condition, errors = trajectory.condition, []

    def compare(step: Step) -> None:
        drawn = step.run().prev_sample
        if step.child == 0:
            errors.append((step.k, max(_error(step.sample, trajectory.states[:, step.k]), _error(drawn, trajectory.actions[:, step.k]))))

    def leave(k: int) -> bool:
        if k >= steps:
            raise Enough
        return True

    with suppress(Enough), driver.noise(condition, deterministic=not bool(trajectory.stochastic.any())):
        driver.drive(condition, compare, needs_denoiser=leave)
    error = max(found for _, found in errors)
    if error == 0:
        return
    first = next(k for k, found in errors if found > 0)
    message = f"A second roll-out with the same seeds is not the first one from solver step {first} on: off by {100 * error:.2g}% of the largest value."
    # Kernels that add up in no fixed order are off by more than those of one step alone, which are the same ones.
    if error > 10 * _rounding(trajectory.states):
        raise ValueError(
            f"{message} {type(driver.pipeline).__name__} draws noise that no seed fixes, or writes into its arguments, so that replayed log-probabilities "
            "would be of other samples and ratios wrong. Nothing was trained."
        )
    logger.warning(f"{message} That is rounding: the kernels are not deterministic, and ratio_error will not be exactly 0.")


class CarriedState(OfDriver):
    """Finds out whether a pipeline carries something from step to step beside its latents, which gated steps do not see: the caches of
    denoisers by their hooks, anything else (a guider with momentum) by comparing one step alone with that of a whole pass, once for each kind of call."""

    def __init__(self, driver: Driver):
        super().__init__(driver)
        self._off: dict[tuple, float] = {}

    def refuse(self, trajectory: Trajectory, wanted: Collection[int]) -> None:
        """Raise a ValueError if the steps `wanted` come out otherwise when those before them are gated."""
        if not wanted or set(wanted) == set(range(max(wanted) + 1)):
            return
        self.refuse_caches(f"solver steps {sorted(wanted)} by themselves")
        key = kind_of_call(trajectory)
        if key not in self._off:
            self._off[key] = self._measured(trajectory)
        if self._off[key] > _rounding(trajectory.states):
            raise ValueError(
                f"{type(self.driver.pipeline).__name__} carries something from step to step beside its latents (a guider with momentum, say): a step by itself "
                f"is off by {100 * self._off[key]:.2g}% from that of a whole pass. Replay all steps from the first on, with noise at each of them."
            )

    def refuse_caches(self, what: str) -> None:
        """Raise a ValueError if a denoiser has a cache that remembers earlier steps."""
        for name, module in self.driver.denoisers.items():
            if found := caches(module):
                raise ValueError(
                    f"{name} has a {found[0]}, which remembers earlier steps: {what} would not be those of a whole pass. Whole passes are exact "
                    f"(every step from the first on); for anything else switch it off, pipeline.{name}.disable_cache()."
                )

    @torch.no_grad()
    def _measured(self, trajectory: Trajectory) -> float:
        """How far a step whose predecessor is gated is from that of a whole pass at most, relative to its largest value. Every second step is
        looked at: what is carried may act in a part of them only, as guidance does."""
        means: list[dict[int, Tensor]] = []
        for steps in (range(trajectory.num_steps), range(1, trajectory.num_steps, 2)):
            means.append({})
            force(self.driver, trajectory, lambda k, kernel: means[-1].__setitem__(k, kernel.mean), steps, trajectory.condition)
        whole, alone = means
        return max(_error(alone[k], whole[k]) for k in alone)


def _error(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape:
        return float("inf")
    difference = (actual.double() - expected.to(actual.device).double()).abs().max()
    return float(difference / expected.double().abs().max().clamp(min=1e-12).to(difference.device))


def _rounding(states: Tensor) -> float:
    """What kernels that are not deterministic make of equal inputs at most, relative to the largest value."""
    return 1e-6 if states.dtype == torch.float32 else 3e-3
