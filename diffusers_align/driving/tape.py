"""Record a pipeline's solver steps into a trajectory, and walk the same way again."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..condition import Condition
from ..trajectory import Trajectory
from ..transition import GaussianTransition
from .chains import OTHER_SIZE
from .scheduler_hook import NO_OWN_STEP, OTHER_NUMBER, Step
from .steps_apart import GraphOfSteps, Recalled, SharedGraph

if TYPE_CHECKING:
    from .driver import Driver


class Tape:
    """Collects steps, each child scheduler's by itself; `record` is an `on_step` of the driver, and `add` is for one that chooses its own.

    Args:
        on_step: gets the number and the kernel of each step of the main scheduler that draws noise, as in a replay.
    """

    def __init__(self, on_step: Callable[[int, GaussianTransition], None] | None = None):
        self.on_step = on_step
        self.rows: dict[int, list[dict[str, Any]]] = {}

    def record(self, step: Step) -> None:
        """Run the step and keep its state, action, log-probability and place in the schedule."""
        state, output = step.sample.detach().clone(), step.run()
        self.add(step, state, output.prev_sample.detach().clone(), output.log_prob)
        if self.on_step is not None and step.child == 0 and output.log_prob is not None:
            self.on_step(step.k, GaussianTransition(output.prev_sample_mean, output.std))

    def add(self, step: Step, state: Tensor, action: Tensor, log_prob: Tensor | None) -> None:
        """Keep a step that has run: the states (B, *D) before and after it, and the log-probabilities (B,), None where it has no noise."""
        self.rows.setdefault(step.child, []).append({"state": state, "action": action, "log_prob": log_prob, **_schedule(step)})

    def trajectory(self, condition: Condition) -> Trajectory:
        """What was recorded, the main scheduler's steps with those of the others as `children`.

        Raises:
            ValueError: no step was taken, or none of the pipeline's own scheduler, or the pipeline made another number of samples than the condition
                has prompts, or states of several sizes.
        """
        if not self.rows:
            raise ValueError(
                "The pipeline took no step of its scheduler, so that there is no trajectory: num_inference_steps or strength asks for none, or another "
                "scheduler steps in its place (the parts of a combined pipeline hold their own)."
            )
        if 0 not in self.rows:
            raise ValueError(NO_OWN_STEP)
        if wrong := {len(row["state"]) for rows in self.rows.values() for row in rows} - {len(condition)}:
            raise ValueError(OTHER_NUMBER.format(min(wrong), len(condition)))
        for rows in self.rows.values():
            sizes = list(dict.fromkeys(tuple(row["state"].shape[1:]) for row in rows))
            if len(sizes) > 1:
                raise ValueError(OTHER_SIZE.format(sizes[0], sizes[1]))
        main, *children = (_trajectory(self.rows[child], condition) for child in sorted(self.rows))
        return Trajectory(**{**vars(main), "children": tuple(children)})


def force(driver: Driver, trajectory: Trajectory, on_step: Callable[[int, GaussianTransition], None], wanted: Collection[int], condition: Condition) -> None:
    """One pass of the pipeline with the recorded actions forced; `on_step(k, kernel)` gets the kernels of the solver steps `wanted`, the only ones
    for which the denoiser runs. With gradients, and where the steps' graphs hang together, a pass for each of them (`driving.steps_apart`).

    Args:
        condition: the trajectory's own, or another of as many samples.

    Raises:
        ValueError: the pipeline arrives at another state than the recorded one.
    """
    left, graphs = sorted(wanted), GraphOfSteps()
    kind = (kind_of_call(trajectory), tuple(left))  # what is carried may be read in later steps only

    def looked_at(k: int, kernel: GaussianTransition) -> None:
        graphs.look(kernel.mean)
        left.remove(k)
        on_step(k, kernel)

    apart = driver.steps_apart.get(kind) if torch.is_grad_enabled() else False
    if not apart:
        try:
            forced_pass(driver, trajectory, on_step if apart is False else looked_at, wanted, condition, lambda k: k in wanted)
            if apart is None:
                driver.steps_apart[kind] = False
            return
        except SharedGraph:
            driver.steps_apart[kind] = True
    recalled = Recalled()
    for k in left:
        recalled.begin(k)
        with driver.denoising(recalled.call):
            forced_pass(driver, trajectory, on_step, {k}, condition, recalled.needs_denoiser)


def kind_of_call(trajectory: Trajectory) -> tuple:
    """What decides what a pipeline carries from step to step, of a trajectory's call."""
    kwargs = trajectory.condition.kwargs
    return (trajectory.num_steps, *sorted((name, str(value)) for name, value in kwargs.items() if not isinstance(value, Tensor)))


def forced_pass(driver: Driver, trajectory: Trajectory, on_step, wanted: Collection[int], condition: Condition, needs_denoiser: Callable[[int], bool]) -> None:
    """One walk of the pipeline with the recorded actions forced; `on_step(k, kernel)` at the steps `wanted`, whose denoiser calls `needs_denoiser` opens."""
    # From the recorded actions on, such a pipeline moves its states by the present weights, as a roll-out of these would.
    moves_states = driver.calls.takes_gradients

    def forced(step: Step) -> Tensor:
        tape = trajectory if step.child == 0 else trajectory.children[step.child - 1]
        action = step.like(tape.actions[:, step.k])
        if step.k not in wanted:
            step.skip()
            return action
        if not moves_states:
            check_state(step, tape)
        output = step.run(prev_sample=action)
        if step.child == 0:
            on_step(step.k, GaussianTransition(output.prev_sample_mean, output.std))
        return action

    driver.drive(condition, forced, needs_denoiser=needs_denoiser)


def check_state(step: Step, recorded: Trajectory) -> None:
    """Raise a ValueError if the pipeline does not stand at the recorded state."""
    expected = recorded.states[:, step.k].to(step.sample.device)
    if expected.shape == step.sample.shape and torch.allclose(step.sample.float(), expected.float(), rtol=1e-2, atol=1e-3):
        return
    raise ValueError(
        f"At solver step {step.k} the pipeline stands at another state than the one recorded. A replay needs the call "
        "arguments, the seeds and the frozen components of the rollout."
    )


def _schedule(step: Step) -> dict[str, float]:
    sigmas = getattr(step.scheduler, "levels", getattr(step.scheduler, "sigmas", None))
    index = getattr(step.scheduler, "step_index", None)
    sigma = float(sigmas[index - 1]) if sigmas is not None and index else float("nan")
    return {"timestep": step.time, "sigma": sigma}


def _trajectory(rows: list[dict[str, Any]], condition: Condition) -> Trajectory:
    return Trajectory(
        states=torch.stack([row["state"] for row in rows], 1),
        actions=torch.stack([row["action"] for row in rows], 1),
        timesteps=torch.tensor([row["timestep"] for row in rows]),
        sigmas=torch.tensor([row["sigma"] for row in rows]),
        stochastic=torch.tensor([row["log_prob"] is not None for row in rows]),
        log_probs=torch.stack([_log_prob(row) for row in rows], 1),
        condition=condition,
    )


def _log_prob(row: dict[str, Any]) -> Tensor:
    state = row["state"]
    return row["log_prob"].detach() if row["log_prob"] is not None else torch.full((len(state),), torch.nan, dtype=torch.float64, device=state.device)
