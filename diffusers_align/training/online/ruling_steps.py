r"""Solver steps whose log-probability answers to the model far more than that of the others, so that a policy gradient is about them.

A step's mean moves by $J$ with a unit of model output, its noise has the standard deviation $s$: the gradient of its log-probability grows with
$J / s$. Along most schedules that is of one size. Where few steps end close to the clean sample, the last step with noise moves as far as others with
a fiftieth of their noise, and outweighs them all (`benchmarks/step_sensitivity.py`).
"""

from __future__ import annotations

import torch

from ...trajectory import Trajectory

RULES = 5.0  # times as much as at any other step


def sensitivities(scheduler, trajectory: Trajectory, steps: list[int]) -> dict[int, float]:
    """J / s of those solver steps that have noise, by the scheduler that has just made the trajectory.

    Empty for samplers with noise of their own, whose variance may be the model's, and where the scheduler has gone on to another schedule.
    """
    if "sde_window" not in scheduler.config:
        return {}
    known, times = set(scheduler.timesteps.flatten().tolist()), {k: trajectory.timesteps[k] for k in steps if trajectory.stochastic[k]}
    if not all(float(at) in known for at in times.values()):
        return {}
    zero, small = torch.zeros([1] * trajectory.final.ndim), 1e-2  # so small that nothing is clipped
    found = {}
    for k, at in times.items():
        here, there = scheduler.transition(zero, at, zero), scheduler.transition(zero + small, at, zero)
        found[k] = float((there.mean - here.mean).abs().max()) / small / float(here.std.max())
    return found


def ruling_steps(found: dict[int, float]) -> list[int]:
    """Those that answer more than `RULES` times as much as all others, in order: half of the steps at most, none where there is no such gap."""
    order = sorted(found, key=found.__getitem__, reverse=True)
    gaps = [i for i in range(1, len(order) // 2 + 1) if found[order[i - 1]] > RULES * found[order[i]]]
    return sorted(order[: gaps[-1]]) if gaps else []


def describe_ruling_steps(scheduler, trajectory: Trajectory, steps: list[int]) -> list[str]:
    """Which of the trained `steps` rule the gradient, in words, and the window that leaves them out; nothing where none does, or where they come first."""
    ruling = ruling_steps(sensitivities(scheduler, trajectory, steps))
    if not ruling:
        return []
    before = len(scheduler.timesteps) - trajectory.num_steps  # a strength below 1 leaves out the first steps, which a window counts
    first, end = (scheduler.config.get("sde_window") or [before])[0], before + ruling[0]
    if end <= max(first, before):
        return []
    named = ", ".join(str(before + k) for k in ruling)
    one = len(ruling) == 1
    return [
        f"Solver step{'' if one else 's'} {named} of 0 to {len(scheduler.timesteps) - 1}: so little noise that the log-probability answers to the model "
        f"more than {RULES:g} times as much as at the other trained steps. {'It rules' if one else 'They rule'} the gradient. "
        f"--sde_window {first} {end} leaves {'it' if one else 'them'} to the solver, without noise."
    ]
