"""What happens at each denoiser call and each solver step of a differentiable roll-out, and what it starts from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..condition import positions
from ..driving.scheduler_hook import Step
from ..forward_process import ForwardProcess
from ..schedulers import SigmaSDEScheduler, sde_twin
from ..transition import GaussianTransition
from .recompute import recomputed


@dataclass(frozen=True)
class StepOutput:
    """What one solver step made of the denoiser's answer.

    Attributes:
        model_output: (B, *D), as the scheduler got it, guidance included.
        next_state: (B, *D), what the step returned.
        clean: (B, *D), the clean sample that the model predicts, where the scheduler computes one.
        transition: its kernel, where it is a stochastic one.
    """

    model_output: Tensor
    next_state: Tensor
    clean: Tensor | None
    transition: GaussianTransition | None


class Walk:
    """The hooks of one roll-out: around each denoiser call, and at each solver step.

    Args:
        grad_steps, stop_step, detach_input, checkpoint: as of `differentiable_rollout`.
        differentiated: whether the pipeline differentiates through its denoiser itself, so that each call has a graph, if not one that goes on.

    Raises:
        ValueError: steps that are no whole numbers from 0 on, or gradient steps beyond the last.
    """

    def __init__(self, grad_steps: Iterable[int], stop_step: int | None, detach_input: bool, checkpoint: bool | None, differentiated: bool = False):
        self.differentiated = differentiated
        self.stop_step = None if stop_step is None else _step_numbers("stop_step", [stop_step])[0]
        self.grad_steps, self.detach_input, self.checkpoint = frozenset(_step_numbers("grad_steps", grad_steps)), detach_input, checkpoint
        if checkpoint is None:
            self.checkpoint = len(self.grad_steps) > 1
        if self.stop_step is not None and any(k > self.stop_step for k in self.grad_steps):
            raise ValueError(f"grad_steps {sorted(self.grad_steps)} reach beyond stop_step {self.stop_step}, where the walk ends.")
        self.k = 0
        self.final: dict[int, Tensor] = {}
        self.actions: dict[tuple[int, int], Tensor] = {}
        self.states: list[Tensor] = []
        self.timesteps: list[float] = []
        self.steps: dict[int, StepOutput] = {}

    @property
    def needs_denoiser(self) -> Callable[[int], bool] | None:
        """Of solver step k, whether its denoiser calls are made; None: all are."""
        return None if self.stop_step is None else lambda k: k <= self.stop_step

    def check_taken(self) -> None:
        """Raise a ValueError if the call had fewer steps than were asked for."""
        for name, last in (("grad_steps", max(self.grad_steps, default=0)), ("stop_step", self.stop_step or 0)):
            if last >= self.k:
                raise ValueError(
                    f"{name} names step {last}, but the call took {self.k} solver steps, 0 to {self.k - 1}; count_steps(policy, condition) counts them."
                )

    def denoise(self, forward: Callable, *args: Any, **kwargs: Any):
        """A denoiser call, in the place of its `forward`."""
        if self.k not in self.grad_steps:
            with torch.set_grad_enabled(self.differentiated):
                return pytree.tree_map_only(Tensor, Tensor.detach, forward(*args, **kwargs))
        return self.call(forward, *args, **kwargs)

    def call(self, forward: Callable, *args: Any, **kwargs: Any):
        """With the graph, as the roll-out has it."""
        if self.detach_input:
            args, kwargs = pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        args, kwargs = _latents_kept(args, kwargs)
        # A pipeline that looks into its denoiser would see a second computation there, too.
        return recomputed(forward, *args, **kwargs) if self.checkpoint and not self.differentiated else forward(*args, **kwargs)

    def on_step(self, step: Step) -> Tensor | None:
        """A solver step, for the driver."""
        if self.stop_step is not None and step.k > self.stop_step:
            if step.portion:
                raise ValueError("The call walks several schedules one after the other, so that it has no end at a step of the first one: leave stop_step out.")
            step.skip()
            self._next(step)
            return self.final[step.child]
        # Some pipelines write the next state into the tensor of this one, which the solver's graph needs.
        output = step.run(sample=step.sample.clone()) if step.sample.requires_grad else step.run()
        self.final[step.child] = _clean_sample(step) if step.k == self.stop_step else output.prev_sample
        if step.child == 0:
            self.states.append(step.sample.detach())
            self.timesteps.append(step.time)
            if step.k in self.grad_steps:
                self.steps[step.k] = step_output(step, self.final[0])
        self._next(step)
        return self.final[step.child]

    def _next(self, step: Step) -> None:
        self.actions[step.child, step.k] = self.final[step.child]
        if step.child == 0:
            self.k = step.k + 1


def _latents_kept(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The call with a copy of its first argument, the latents: some pipelines write the next state into their tensor, which the way back needs."""
    if args:
        return (pytree.tree_map_only(Tensor, Tensor.clone, args[0]), *args[1:]), kwargs
    first = next(iter(kwargs), None)
    return args, kwargs if first is None else {**kwargs, first: pytree.tree_map_only(Tensor, Tensor.clone, kwargs[first])}


def step_output(step: Step, next_state: Tensor) -> StepOutput:
    """What a step that has been run made of the denoiser's answer."""
    std = getattr(step.output, "std", None)
    stochastic = std is not None and bool((std > 0).any())
    kernel = GaussianTransition(step.output.prev_sample_mean, std) if stochastic else None
    return StepOutput(step.model_output, next_state, getattr(step.output, "pred_original_sample", None), kernel)


def _clean_sample(step: Step) -> Tensor:
    """The clean sample (B, *D) that the model's output at this step implies."""
    clean, twin = getattr(step.output, "pred_original_sample", None), None
    if clean is None:
        twin = sde_twin(step.scheduler)
    if isinstance(twin, SigmaSDEScheduler):
        clean = twin.clean_at(_noise_level(step, twin), step.model_output, step.sample)
    elif hasattr(twin, "clean_sample"):
        clean = twin.clean_sample(step.model_output, step.timestep, step.sample)
    if clean is None:
        scale = getattr(step.scheduler, "scale_model_input", lambda x, t: x)
        t = torch.as_tensor(step.timestep).reshape(-1).expand(len(step.sample))
        clean = ForwardProcess(twin).to_x0(step.model_output, scale(step.sample, step.timestep), t)
    return clean.to(step.sample.dtype)


def _noise_level(step: Step, twin: SigmaSDEScheduler) -> Tensor:
    """Of the state that a step which has been run has left: as its solver has it, whose timesteps may be rounded; by the timestep where a solver has levels
    between those of its table."""
    scheduler = step.scheduler
    if hasattr(scheduler, "sigmas_interpol"):
        return twin.space.sigma_of(torch.as_tensor(step.timestep).reshape(1))[0]
    return scheduler.sigmas[scheduler.step_index - 1]


def _step_numbers(name: str, steps: Iterable[int]) -> list[int]:
    """Whole numbers from 0 on, duplicates included."""
    try:
        found = positions(steps)
    except TypeError:
        raise ValueError(f"{name} must be whole numbers of solver steps, got {steps!r}.") from None
    if any(k < 0 for k in found):
        raise ValueError(f"{name} count solver steps from 0 on, got {found}; the last of K steps is K - 1 (count_steps).")
    return found


class Start:
    """What a roll-out starts from.

    Args:
        noise, gradient: `noise` and `noise_gradient` of `differentiable_rollout`.

    Raises:
        ValueError: noise that is no tensor of finite floats, or, when the pipeline draws its own, of another shape.
    """

    def __init__(self, noise: Tensor | None, gradient: bool):
        if noise is not None and not (isinstance(noise, Tensor) and noise.is_floating_point() and bool(noise.isfinite().all())):
            raise ValueError("noise must be a tensor of finite floats (B, *D), standard normal.")
        self.noise, self.gradient = noise, gradient

    def put(self, drawn: Tensor) -> Tensor:
        """What the pipeline gets in the place of the noise (B, *D) that it has drawn."""
        if self.noise is not None and self.noise.shape != drawn.shape:
            raise ValueError(f"noise has the shape {tuple(self.noise.shape)}; the pipeline starts from noise of shape {tuple(drawn.shape)}.")
        noise = drawn if self.noise is None else self.noise
        self.noise = noise.detach().requires_grad_() if self.gradient else noise
        return self.noise.to(drawn)
