"""Which solver steps of a trajectory a replay trains: the rule of DDPO and of the GRPO family. Imports no torch, since flags are checked with it."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...trajectory import Trajectory


def first_share(number: int, fraction: float) -> int:
    """How many of `number` solver steps their first `fraction` is (`--timestep_fraction`): rounded down, at least one."""
    return max(1, int(number * fraction))


def trained_steps(trajectory: Trajectory, timestep_fraction: float = 1.0, random_timestep_fraction: float = 1.0, key: str = "") -> list[int]:
    """The steps with noise among the first ones, or a random share of those, in order.

    Args:
        timestep_fraction: the first share of the solver steps, see `first_share`; 0.99 leaves out the last of up to a hundred.
        random_timestep_fraction: the share of those that is drawn, rounded to the nearest, at least one.
        key: fixes the draw: equal keys draw the same on every process and after a resume.
    """
    end = first_share(trajectory.num_steps, timestep_fraction)
    return some_of([k for k in trajectory.noisy_steps if k < end], random_timestep_fraction, key)


def some_of(steps: list[int], share: float, key: str) -> list[int]:
    """A random share of the steps, rounded to the nearest number, at least one; in order. `key` fixes the draw."""
    return sorted(random.Random(key).sample(steps, min(len(steps), max(1, round(len(steps) * share)))))
