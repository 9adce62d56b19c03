"""Which solver steps of a trajectory a replay trains: the rule of DDPO and of the GRPO family. Imports no torch, since flags are checked with it."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

QUIET = 0.1  # of the next louder step's noise

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


def describe_quiet_steps(noise: dict[int, float]) -> list[str]:
    """Which of the trained steps have next to no noise beside the others, in words, and how to leave them out; nothing where there are none.

    The log-probability of a step answers to the weights by the move of its mean over its noise. Where a schedule ends close to the clean sample, the last
    step moves as far as others with a hundredth of their noise.

    Args:
        noise: the standard deviation of each trained step.
    """
    loud = sorted(noise.values())
    falls = [i for i in range(1, len(loud)) if loud[i - 1] < QUIET * loud[i]]
    quiet = sorted(k for k, std in noise.items() if falls and std < loud[falls[-1]])
    if not quiet or quiet[-1] < max(noise):
        return []
    steps, draw = (f"Solver step {quiet[0]}", "draws") if len(quiet) == 1 else (f"Solver steps {quiet[0]} to {quiet[-1]}", "draw")
    return [
        f"{steps} {draw} with less than a tenth of the other steps' noise, so the log-probability there answers to the weights far more than elsewhere: it "
        f"rules the gradient, and is what the clip is about. --sde_window 0 {quiet[0]} leaves it out: the solver's own step is taken there."
    ]


def some_of(steps: list[int], share: float, key: str) -> list[int]:
    """A random share of the steps, rounded to the nearest number, at least one; in order. `key` fixes the draw."""
    return sorted(random.Random(key).sample(steps, min(len(steps), max(1, round(len(steps) * share)))))
