r"""Reward gradients through the sampling of any stock pipeline: one roll-out whose images keep their autograd graph.

Every method of this kind differentiates $r(\mathrm{decode}(x_K))$ along the solver's chain and differs in which denoiser calls take
part. So there is one roll-out, and the methods are choices of `grad_steps` (`diffusers_align.algorithms`):

* A denoiser call outside `grad_steps` runs under `no_grad`: no graph, no buffers. The solver's own arithmetic stays in the graph as
  soon as the state does, so a gradient passes such a step along its linear path, $x_{k+1} = A_k x_k + B_k \epsilon_k$.
* Several calls inside are checkpointed: their activations are computed again on the way back, so memory does not grow with their number.
* `detach_input` cuts what the denoiser sees, not what the solver carries on.
* With `noise_gradient` the initial noise is a leaf of the graph (`diffusers_align.driving.initial_noise`).

A step is a call of `scheduler.step`: a second-order solver takes two for one of `num_inference_steps` (`count_steps` counts them).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..checks.ranges import checked
from ..condition import Condition
from ..driving.initial_noise import initial_noise
from ..driving.outcome import Outcome, by_sample, images_of
from ..driving.scheduler_hook import Step
from ..driving.stock import stock_solver
from ..policy import Policy
from .decoding import light_decoding
from .walk import Start, StepOutput, Walk, step_output


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
        actions: what each step returned (B, *D) with its graph, by (scheduler, solver step); scheduler 0 is the pipeline's own, the others its copies.
        call: how the gradient steps call a denoiser's `forward`: `call(forward, *args, **kwargs)`, checkpointed and with constant inputs if theirs are.
        noise: (B, *D), the standard normal initial noise, where it was given or asked for; a leaf of the graph if `noise_gradient`.
    """

    condition: Condition
    images: Tensor | None
    latents: Tensor
    states: list[Tensor]
    timesteps: list[float]
    steps: dict[int, StepOutput]
    stochastic: bool
    actions: dict[tuple[int, int], Tensor] = field(repr=False)
    call: Callable = field(repr=False)
    noise: Tensor | None = None

    @property
    def finals(self) -> list[Tensor]:
        """The detached final states (B, *D) of the pipeline's scheduler and of the copies it makes."""
        last = {child: action for (child, _), action in sorted(self.actions.items())}
        return [last[child].detach() for child in sorted(last)]


@contextmanager
def _solver(policy: Policy, condition: Condition, stochastic: bool) -> Iterator[None]:
    """The policy's kernels or the stock solver, either with the noise that the condition's seeds are for."""
    with nullcontext() if stochastic else stock_solver(policy), policy.noise(condition, deterministic=not stochastic):
        yield


@checked
def differentiable_rollout(
    policy: Policy,
    condition: Condition,
    *,
    grad_steps: Iterable[int],
    stop_step: int | None = None,
    stochastic: bool = False,
    detach_input: bool = False,
    checkpoint: bool | None = None,
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
        checkpoint: compute the activations of each gradient step again on the way back. None: where there are several. A single one's, kept, take
            no more than they would on the way back, but beside what the decoding keeps.
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
    walk = Walk(grad_steps, stop_step, detach_input, checkpoint, policy.calls.takes_gradients)
    start, own = Start(noise, noise_gradient), {} if generator is None else {"generator": generator}
    with ExitStack() as stack, torch.enable_grad():
        stack.enter_context(_solver(policy, condition, stochastic))
        if noise is not None or noise_gradient:
            stack.enter_context(initial_noise(policy.pipeline, start.put))
        stack.enter_context(policy.denoising(walk.denoise))
        if decode:
            stack.enter_context(light_decoding(policy.pipeline, decode_checkpoint, frames))
        output = policy.drive(condition, walk.on_step, needs_denoiser=walk.needs_denoiser, **own, **({"output_type": "pt"} if decode else {}))
    walk.check_taken()
    images = by_sample(Outcome(images_of(output)), len(condition)).images if decode else None
    return DifferentiableRollout(condition, images, walk.final[0], walk.states, walk.timesteps, walk.steps, stochastic, walk.actions, walk.call, start.noise)


@checked
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
        policy.drive(condition, skip, needs_denoiser=lambda k: False)
    return taken[0]


def outputs_along(policy: Policy, rollout: DifferentiableRollout, *, reference: bool = False) -> dict[int, StepOutput]:
    """The gradient steps' outputs under the current weights, or with `reference` the pretrained model's, at the roll-out's states.

    With autograd on they have the graph of these states: how the two models differ at x_k depends on the steps before by both. It
    is recomputed on the way back where the roll-out's is, and there is none at the first gradient step, whose state is constant.
    """
    found: dict[int, StepOutput] = {}
    context = policy.reference if reference else nullcontext

    def denoise(forward: Callable, *args: Any, **kwargs: Any):
        @functools.wraps(forward)
        def of_model(*args: Any, **kwargs: Any):
            with context():  # again on the way back, when the caller's has ended
                return forward(*args, **kwargs)

        return rollout.call(of_model, *args, **kwargs)

    def force(step: Step) -> Tensor:
        action = step.like(rollout.actions[step.child, step.k])
        if step.child == 0 and step.k in rollout.steps:
            step.run(**({"prev_sample": action.detach()} if rollout.stochastic else {}))
            found[step.k] = step_output(step, step.output.prev_sample)
        else:
            step.skip()
        return action

    with _solver(policy, rollout.condition, rollout.stochastic), policy.denoising(denoise):
        policy.drive(rollout.condition, force, needs_denoiser=lambda k: k in rollout.steps)
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
        policy.drive(condition, take, needs_denoiser=lambda step: step == k)
    if not found:
        raise ValueError(f"The call has no solver step {k}.")
    return found[0]
