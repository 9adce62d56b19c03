"""Recurrence (time travel): which steps of a solver can be made again, and what it remembers of them.

A repeated step starts from a state that was noised back to its level. A solver remembers more than that: where it stands, earlier outputs
(multistep methods), or the state that a step of second order began at. Earlier outputs are no part of the path that leads to the new state,
so the solver starts anew there, at lower order for a step (`restarted`), and
steps are repeated in the units that it completes them in: a step that lowers no noise ends the one before it, as Heun's corrector does.
"""

from __future__ import annotations

from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..algorithms.guidance import Level
from ..driving.scheduler_hook import Step
from .draws import copied


def whole_steps(levels: list[Level]) -> list[list[int]]:
    """Solver steps 0 to K - 1 in the units that can be repeated; `levels` are K + 1, from noise to data."""
    units: list[list[int]] = []
    for k, (before, after) in enumerate(zip(levels, levels[1:])):
        if units and before.sigma == after.sigma:
            units[-1].append(k)
        else:
            units.append([k])
    return units


def run_time_state(scheduler) -> dict[str, Any]:
    """A copy of all that a scheduler remembers beside its config."""
    return {name: pytree.tree_map_only(Tensor, Tensor.clone, value) for name, value in vars(scheduler).items() if name != "_internal_dict"}


def put_back(scheduler, state: dict[str, Any]) -> None:
    """Make a scheduler remember `state`, and nothing else."""
    for name in set(vars(scheduler)) - set(state) - {"_internal_dict"}:
        del vars(scheduler)[name]
    vars(scheduler).update({name: pytree.tree_map_only(Tensor, Tensor.clone, value) for name, value in state.items()})


def restarted(first: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The state of a solver that starts where it is `now`, given its state before its `first` step; one without an index counts its steps by what
    it remembers, and keeps that."""
    return {**first, "_step_index": now["_step_index"]} if "_step_index" in now else now


def raised_in(error: BaseException) -> CodeType:
    """The code that raised it."""
    place = error.__traceback__
    while place.tb_next is not None:
        place = place.tb_next
    return place.tb_frame.f_code


def reads_state(step: Step, state: Tensor, output: Tensor, slope: float) -> bool:
    """Whether the solver goes on from the state that it is given, found by two trials with equal draws; it is left as it was.

    `slope` is the output's change that keeps the clean estimate where the state changes by 1.
    """
    before, results = run_time_state(step.scheduler), []
    for offset in (0.0, 1.0):
        draws = {"generator": copied(step.generator)} if step.generator is not None else {}
        with torch.random.fork_rng():
            results.append(step.run(sample=state + offset, model_output=output + slope * offset, **draws).prev_sample.float())
        put_back(step.scheduler, before)
    return bool((results[1] - results[0]).abs().mean() > 1e-4)
