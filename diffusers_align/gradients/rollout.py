r"""Reward gradients through the sampling of any stock pipeline: one roll-out whose images know how they came about.

Every method of this kind differentiates $r(\mathrm{decode}(x_K))$ along the solver's chain and differs in which denoiser calls take
part. So there is one roll-out, and the methods are choices of `grad_steps` (`diffusers_align.algorithms`):

* A denoiser call outside `grad_steps` runs under `no_grad`: no graph, no buffers. The solver's own arithmetic stays in the graph as
  soon as the state does, so a gradient passes such a step along its linear path, $x_{k+1} = A_k x_k + B_k \epsilon_k$.
* A call inside is checkpointed: its activations are computed again on the way back, so memory does not grow with their number.
* `detach_input` cuts what the denoiser sees, not what the solver carries on.
* With `noise_gradient` the initial noise is a leaf of the graph (`diffusers_align.driving.initial_noise`).

A step is a call of `scheduler.step`: a second-order solver takes two for one of `num_inference_steps` (`count_steps` counts them).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint as checkpointed

from ..condition import Condition, positions
from ..driving.initial_noise import initial_noise
from ..driving.steps import Step
from ..forward_process import ForwardProcess
from ..policy import Policy, _images
from ..schedulers import sde_twin
from ..stock import stock_solver
from ..transition import GaussianTransition
from .decoding import light_decoding, replaced


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


@dataclass(frozen=True)
class DifferentiableRollout:
    """B samples along K solver steps.

    Attributes:
        condition: the call that made them.
        images: (B, 3, H, W) or (B, F, 3, H, W) in [0, 1], clamped once, with their graph; None without decoding.
        latents: (B, *D), the final state with its graph.
        states: K detached (B, *D), what the denoiser and the scheduler saw at each step; fewer if it stopped early.
        timesteps: of those steps.
        steps: of each gradient step its output with the graph, by solver step.
        stochastic: whether it was drawn from the policy's kernels.
        noise: (B, *D), the standard normal initial noise, where it was given or asked for; a leaf of the graph if `noise_gradient`.
    """

    condition: Condition
    images: Tensor | None
    latents: Tensor
    states: list[Tensor]
    timesteps: list[float]
    steps: dict[int, StepOutput]
    stochastic: bool
    _actions: dict[tuple[int, int], Tensor] = field(repr=False)
    _call: Callable = field(repr=False)
    noise: Tensor | None = None

    @property
    def finals(self) -> list[Tensor]:
        """The detached final states (B, *D) of the pipeline's scheduler and of the copies it makes."""
        last = {child: action for (child, _), action in sorted(self._actions.items())}
        return [last[child].detach() for child in sorted(last)]


@contextmanager
def _solver(policy: Policy, condition: Condition, stochastic: bool) -> Iterator[None]:
    """The policy's kernels or the stock solver, either with the noise that the condition's seeds are for."""
    with nullcontext() if stochastic else stock_solver(policy), policy._noise(condition, deterministic=not stochastic):
        yield


class _Walk:
    """The hooks of one roll-out: around each denoiser call, and at each solver step."""

    def __init__(self, grad_steps: frozenset[int], stop_step: int | None, detach_input: bool, checkpoint: bool):
        self.grad_steps, self.stop_step, self.detach_input, self.checkpoint = grad_steps, stop_step, detach_input, checkpoint
        self.k = 0
        self.final: dict[int, Tensor] = {}
        self.actions: dict[tuple[int, int], Tensor] = {}
        self.states: list[Tensor] = []
        self.timesteps: list[float] = []
        self.steps: dict[int, StepOutput] = {}

    def denoise(self, forward: Callable, *args: Any, **kwargs: Any):
        if self.k not in self.grad_steps:
            with torch.no_grad():
                return forward(*args, **kwargs)
        return self.call(forward, *args, **kwargs)

    def call(self, forward: Callable, *args: Any, **kwargs: Any):
        """With the graph, as the roll-out has it."""
        if self.detach_input:
            args, kwargs = pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        call = partial(forward, *args, **kwargs)
        return checkpointed(call, use_reentrant=False) if self.checkpoint else call()

    def on_step(self, step: Step) -> Tensor | None:
        if self.stop_step is not None and step.k > self.stop_step:
            step.skip()
            self._next(step)
            return self.final[step.child]
        output = step.run()
        self.final[step.child] = _clean_sample(step) if step.k == self.stop_step else output.prev_sample
        if step.child == 0:
            self.states.append(step.sample.detach())
            self.timesteps.append(float(step.timestep))
            if step.k in self.grad_steps:
                self.steps[step.k] = _step_output(step, self.final[0])
        self._next(step)
        return self.final[step.child]

    def _next(self, step: Step) -> None:
        self.actions[step.child, step.k] = self.final[step.child]
        if step.child == 0:
            self.k = step.k + 1


def _step_output(step: Step, next_state: Tensor) -> StepOutput:
    std = getattr(step.output, "std", None)
    stochastic = std is not None and bool((std > 0).all())
    kernel = GaussianTransition(step.output.prev_sample_mean, std) if stochastic else None
    return StepOutput(step.model_output, next_state, getattr(step.output, "pred_original_sample", None), kernel)


def _clean_sample(step: Step) -> Tensor:
    """The clean sample (B, *D) that the model's output at this step implies."""
    clean = getattr(step.output, "pred_original_sample", None)
    if clean is None:
        scale = getattr(step.scheduler, "scale_model_input", lambda x, t: x)
        t = torch.as_tensor(step.timestep).reshape(-1).expand(len(step.sample))
        clean = ForwardProcess(sde_twin(step.scheduler)).to_x0(step.model_output, scale(step.sample, step.timestep), t)
    return clean.to(step.sample.dtype)


def differentiable_rollout(
    policy: Policy,
    condition: Condition,
    *,
    grad_steps: Iterable[int],
    stop_step: int | None = None,
    stochastic: bool = False,
    detach_input: bool = False,
    checkpoint: bool = True,
    decode: bool = True,
    decode_checkpoint: bool = True,
    frames: list[int] | None = None,
    noise: Tensor | None = None,
    noise_gradient: bool = False,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> DifferentiableRollout:
    """Sample one image a prompt with the graph of the chosen denoiser calls.

    Args:
        condition: `policy.condition(prompts, seeds=...)`. The images are those of the stock pipeline at these seeds.
        grad_steps: solver steps whose denoiser calls take part in the graph, counted from 0; draw them once a roll-out. Without any, images
            have a gradient with respect to the initial noise at most.
        stop_step: ends the walk there: the clean sample that the model predicts at this step is decoded, later calls are not made.
        stochastic: draw from the policy's SDE kernels; otherwise walk the scheduler that the pipeline came with.
        detach_input: the denoiser's inputs are constants, so gradients pass through the solver alone (DRTune).
        checkpoint: compute the activations of each gradient step again on the way back.
        decode, decode_checkpoint: whether to decode, and the same for the autoencoder.
        frames: decode these frames of a video only; see `gradients.decoding.decode_latents`.
        noise: (B, *D), standard normal, to start from in the place of the noise that the pipeline draws.
        noise_gradient: the initial noise, given or drawn, is a leaf that requires a gradient: the result's `noise`.
        generator: what the call draws with, in the place of the condition's seeds.

    Raises:
        ValueError: neither seeds nor a generator, a step that the call does not have, or noise of another shape or that cannot be replaced.
    """
    if condition.seeds is None and generator is None:
        raise ValueError("A differentiable roll-out needs seeds: policy.condition(prompts, seeds=[...]).")
    stop_step = None if stop_step is None else _step_numbers("stop_step", [stop_step])[0]
    walk = _Walk(frozenset(_step_numbers("grad_steps", grad_steps)), stop_step, detach_input, checkpoint)
    if stop_step is not None and any(k > stop_step for k in walk.grad_steps):
        raise ValueError(f"grad_steps {sorted(walk.grad_steps)} reach beyond stop_step {stop_step}, where the walk ends.")
    start, own = _Start(noise, noise_gradient), {} if generator is None else {"generator": generator}
    with ExitStack() as stack:
        stack.enter_context(_solver(policy, condition, stochastic))
        if noise is not None or noise_gradient:
            stack.enter_context(initial_noise(policy.pipeline, start.put))
        for module in policy.denoisers.values():
            stack.enter_context(replaced(module, "forward", walk.denoise))
        if decode:
            stack.enter_context(light_decoding(policy.pipeline, decode_checkpoint, frames))
        stack.enter_context(torch.enable_grad())
        gate = None if stop_step is None else (lambda k: k <= stop_step)
        output = policy._drive(condition, walk.on_step, needs_denoiser=gate, **own, **({"output_type": "pt"} if decode else {}))
    for name, last in (("grad_steps", max(walk.grad_steps, default=0)), ("stop_step", stop_step or 0)):
        if last >= walk.k:
            raise ValueError(
                f"{name} names step {last}, but the call took {walk.k} solver steps, 0 to {walk.k - 1}; count_steps(policy, condition) counts them."
            )
    images = _images(output) if decode else None
    return DifferentiableRollout(condition, images, walk.final[0], walk.states, walk.timesteps, walk.steps, stochastic, walk.actions, walk.call, start.noise)


def _step_numbers(name: str, steps: Iterable[int]) -> list[int]:
    """Whole numbers from 0 on, duplicates included."""
    try:
        found = positions(steps)
    except TypeError:
        raise ValueError(f"{name} must be whole numbers of solver steps, got {steps!r}.") from None
    if any(k < 0 for k in found):
        raise ValueError(f"{name} count solver steps from 0 on, got {found}; the last of K steps is K - 1 (count_steps).")
    return found


class _Start:
    """What a roll-out starts from."""

    def __init__(self, noise: Tensor | None, gradient: bool):
        if noise is not None and not (isinstance(noise, Tensor) and noise.is_floating_point() and bool(noise.isfinite().all())):
            raise ValueError("noise must be a tensor of finite floats (B, *D), standard normal.")
        self.noise, self.gradient = noise, gradient

    def put(self, drawn: Tensor) -> Tensor:
        if self.noise is not None and self.noise.shape != drawn.shape:
            raise ValueError(f"noise has the shape {tuple(self.noise.shape)}; the pipeline starts from noise of shape {tuple(drawn.shape)}.")
        noise = drawn if self.noise is None else self.noise
        self.noise = noise.detach().requires_grad_() if self.gradient else noise
        return self.noise.to(drawn)


@torch.no_grad()
def count_steps(policy: Policy, condition: Condition, *, stochastic: bool = False) -> int:
    """How many solver steps the call takes: `num_inference_steps` for most, more for solvers of second order, fewer for a partial
    denoising. Costs one denoiser call at most."""
    taken = [0]

    def skip(step: Step) -> Tensor:
        taken[0] += step.child == 0
        step.skip()
        return step.sample

    with _solver(policy, condition, stochastic):
        policy._drive(condition, skip, needs_denoiser=lambda k: False)
    return taken[0]


def outputs_along(policy: Policy, rollout: DifferentiableRollout, *, reference: bool = False) -> dict[int, StepOutput]:
    """The gradient steps' outputs under the current weights, or with `reference` the pretrained model's, at the roll-out's states.

    With autograd on they have the graph of these states: how the two models differ at x_k depends on the steps before by both. It
    is recomputed on the way back where the roll-out's is, and there is none at the first gradient step, whose state is constant.
    """
    found: dict[int, StepOutput] = {}
    context = policy.reference if reference else nullcontext

    def denoise(forward: Callable, *args: Any, **kwargs: Any):
        def of_model(*args: Any, **kwargs: Any):
            with context():  # again on the way back, when the caller's has ended
                return forward(*args, **kwargs)

        return rollout._call(of_model, *args, **kwargs)

    def force(step: Step) -> Tensor:
        action = step.like(rollout._actions[step.child, step.k])
        if step.child == 0 and step.k in rollout.steps:
            step.run(**({"prev_sample": action.detach()} if rollout.stochastic else {}))
            found[step.k] = _step_output(step, step.output.prev_sample)
        else:
            step.skip()
        return action

    with ExitStack() as stack:
        stack.enter_context(_solver(policy, rollout.condition, rollout.stochastic))
        for module in policy.denoisers.values():
            stack.enter_context(replaced(module, "forward", denoise))
        policy._drive(rollout.condition, force, needs_denoiser=lambda k: k in rollout.steps)
    return found


def solver_step(policy: Policy, condition: Condition, k: int, state: Tensor) -> Tensor:
    """Where solver step k leads from `state` (B, *D), with the graph if autograd is on: one link of the chain by itself.

    Of one-step solvers: one that remembers earlier outputs starts anew here, and leads elsewhere. Step 0 starts at the condition's
    own noise, whatever the `state`, which is then no part of the graph.
    """
    found: list[Tensor] = []

    def take(step: Step) -> Tensor:
        if step.child == 0 and step.k == k:
            found.append(step.run().prev_sample)
        else:
            step.skip()
        if step.child:
            return step.sample
        return step.like(state if step.k < k else found[0])

    with stock_solver(policy):
        policy._drive(condition, take, needs_denoiser=lambda step: step == k)
    if not found:
        raise ValueError(f"The call has no solver step {k}.")
    return found[0]
