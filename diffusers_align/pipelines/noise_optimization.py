"""Noise optimisation as a diffusers pipeline: the initial noise of any stock pipeline, on its own solver, climbs a differentiable reward.

The algorithm's page is `algorithms/noise_optimization.py`. Gradients go through the whole chain by `differentiable_rollout`, whose steps
and decoder compute their activations again on the way back: memory is one denoiser call's.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor

from ..algorithms.noise_optimization import Ascent, NoiseOptimization, ascend, settings
from ..checks.ranges import Count, CountOrNone, NonNegative, Positive, PositiveOrInfinite, checked
from ..condition import Condition
from ..driving.initial_noise import initial_noise
from ..driving.scheduler_hook import Step
from ..gradients.check import scaled_gradients
from ..gradients.rollout import DifferentiableRollout, differentiable_rollout
from ..policy import Policy
from ..schedulers import DDIMSDEScheduler
from .base import WrappedPipeline
from .draws import Generators, copied
from .guided_sampling import GuidanceError
from .judge import Judge


class NoiseOptimizationPipeline(WrappedPipeline):
    """A stock pipeline that starts from noise which a reward has moved.

    >>> pipe = NoiseOptimizationPipeline(DiffusionPipeline.from_pretrained(...), reward="clip_score")  # doctest: +SKIP
    >>> output = pipe("a fox", optimizer="sgd", num_iterations=50, num_inference_steps=1)  # doctest: +SKIP
    >>> output.images, output.rewards, output.reward_history  # doctest: +SKIP
    """

    @checked
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        reward=None,
        optimizer: str = "sgd",
        num_iterations: CountOrNone | None = None,
        learning_rate: Positive | None = None,
        max_grad_norm: PositiveOrInfinite | None = None,
        regularizer: str | None = None,
        regularization: NonNegative | None = None,
        reward_scale: float = 1.0,
        grad_steps: list[int] | None = None,
        batch_size: Count | None = None,
        columns: dict[str, list] | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        **arguments: Any,
    ):
        """
        Args:
            reward: a name or a callable (images, prompts, **columns) -> (B,), with a gradient; in the place of the pipeline's.
            optimizer: `sgd` (ReNO), `adam` (DNO) or `lbfgs` (D-Flow), with its paper's settings (`algorithms.noise_optimization.SETTINGS`).
            num_iterations, learning_rate, max_grad_norm, regularizer, regularization: in the place of those settings. With 0 iterations this is
                the stock call, bit for bit, given the same generators and one output a prompt.
            reward_scale: lambda, by which the reward is multiplied against the regulariser.
            grad_steps: the solver steps whose denoiser calls take part in the gradient, all by default; the others are as constants.
            batch_size: samples optimised at once; all by default, and always 1 for `lbfgs`.
            columns: other arguments of the reward, a list for each with an entry per prompt.
            arguments: the stock call's. Its step callbacks are not called.

        Returns:
            The stock output of each sample's best iterate with `rewards` (B,), `reward_history` (B, iterations + 1) from the stock sample on, `noise`
            (B, *D), and its `noise_norm` and `noise_distance` from the start (B,), both over sqrt(D). A sample whose reward or gradient ceases to be
            finite stops with its best so far and a warning; its history is NaN from there.

        Raises:
            ValueError: no reward or prompt, unknown arguments, a value out of range, or a pipeline that draws no initial noise.
            GuidanceError: a reward without gradient or without a finite value at the stock sample, a pipeline that cuts the graph.
        """
        overrides = {
            "num_iterations": num_iterations, "learning_rate": learning_rate, "max_grad_norm": max_grad_norm,
            "regularizer": regularizer, "regularization": regularization,
        }  # fmt: skip
        chosen = settings(optimizer, **{name: value for name, value in overrides.items() if value is not None})
        condition, generator = self.condition(prompt, {name: value for name, value in arguments.items() if not name.startswith("callback")})
        judge = self.judge(reward, condition, columns, on_invalid="mask")
        rows = torch.arange(len(condition)).split(1 if chosen.optimizer == "lbfgs" else batch_size or len(condition))
        if generator is None:  # one for each sample where they are not drawn together, so that parts draw what the whole does
            own = [torch.Generator().manual_seed(int(torch.randint(2**62, ()))) for _ in range(len(condition) if len(rows) > 1 else 1)]
            generator = own if len(rows) > 1 else own[0]
        before = copied(generator)
        drawn, steps = self._start(condition, generator)
        if len(rows) > 1 and not isinstance(before, list):
            _check_drawn_alone(before, generator, drawn)
        start = drawn.float()
        search = _Search(judge, condition, before, steps if grad_steps is None else _checked_steps(grad_steps, steps))
        with self._differentiable() as policy, self.progress_bar(total=chosen.num_iterations * len(rows)) as bar:
            parts = [search.climb(policy, part.tolist(), start, chosen, reward_scale, bar.update) for part in rows]
        output = self.finish(search.finals, condition, before, output_type=output_type, return_dict=return_dict)
        rewards, noise, history = (torch.cat(found) for found in zip(*((part.rewards, part.noise, torch.stack(part.history, 1)) for part in parts)))
        return self.extended(
            output, rewards=rewards, reward_history=history, noise=noise, noise_norm=_size(noise), noise_distance=_size(noise - start)
        )  # fmt: skip

    def _start(self, condition: Condition, generator: Generators) -> tuple[Tensor, range]:
        """The stock call's noise (B, *D) and its solver steps, by a call whose denoiser is gated; all its draws are made."""
        drawn: list[Tensor] = []

        def note(noise: Tensor) -> Tensor:
            drawn.append(noise)
            return noise

        taken = [0]

        def skip(step: Step) -> Tensor:
            taken[0] += step.child == 0
            step.skip()
            return step.sample

        with initial_noise(self.pipeline, note):
            self.drive(condition, generator, skip, needs_denoiser=lambda k: False, output_type="latent")
        return drawn[0], range(taken[0])

    def _differentiable(self):
        """Context: the pipeline inside as a policy."""
        pipeline = copy.copy(self.pipeline)
        wrapped = WrappedPipeline(pipeline)
        wrapped.prompt_memory = self.prompt_memory
        # Roll-outs walk the stock solver, so any twin stands in for it: solvers without one have their noise optimised as well.
        return wrapped.as_policy(DDIMSDEScheduler())


class _Search:
    """Evaluates noise by roll-outs, and keeps the final states of the best."""

    def __init__(self, judge: Judge, condition: Condition, generator: Generators, grad_steps):
        self.judge, self.condition, self.generator, self.grad_steps = judge, condition, generator, list(grad_steps)
        self.finals: list[Tensor] = []

    def climb(self, policy: Policy, rows: list[int], start: Tensor, chosen: NoiseOptimization, reward_scale: float, on_iterate) -> Ascent:
        """The ascent of these rows of the batch."""
        latest: list[Tensor] = []
        best: list[Tensor] = []

        def evaluate(noise: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
            rewards, slope, latest[:] = self._evaluate(policy, rows, noise, gradient, first=not best)
            return rewards, slope

        def keep(better: Tensor) -> None:
            if not best:
                best.extend(latest)
            best[:] = [torch.where(better.reshape(-1, *[1] * (x.ndim - 1)), x, kept) for x, kept in zip(latest, best)]

        found = ascend(evaluate, start[rows], chosen, reward_scale=reward_scale, on_better=keep, on_iterate=on_iterate)
        self._check(found, rows)
        self.finals = [torch.cat([*before, states]) for *before, states in zip(*([self.finals] if self.finals else []), best)]
        return found

    def _evaluate(self, policy: Policy, rows: list[int], noise: Tensor, gradient: bool, first: bool):
        """Rewards (b,), their gradient (b, *D) and the final states of noise (b, *D) for these rows."""
        own = copied([self.generator[i] for i in rows] if isinstance(self.generator, list) else self.generator)
        rollout = differentiable_rollout(
            policy, self.condition.select(rows), grad_steps=self.grad_steps if gradient else [], noise=noise, noise_gradient=gradient, generator=own
        )  # fmt: skip
        if not isinstance(rollout.images, Tensor):
            raise GuidanceError(
                f"The pipeline returned {type(rollout.images).__name__} instead of tensors: it has no output_type 'pt', and PIL has no gradient."
            )
        with torch.set_grad_enabled(gradient):
            try:
                rewards = self.judge(rollout.images, rows)
            except RuntimeError as error:
                if "requires grad" not in str(error):
                    raise
                raise GuidanceError(f"{_NO_GRADIENT} {error}") from error
        slope = _gradient(rollout, rewards, first) if gradient else None
        return rewards.detach(), slope, rollout.finals

    def _check(self, found: Ascent, rows: list[int]) -> None:
        if lost := [row for row, value in zip(rows, found.rewards.tolist()) if value == -torch.inf]:
            raise GuidanceError(
                f"The reward of the stock samples {lost} is NaN or infinite: there is nothing to climb from. Run in float32, or mend the reward."
            )
        if stopped := [row for row, running in zip(rows, found.running.tolist()) if not running]:
            warnings.warn(
                f"Noise optimisation met a reward or a gradient that is not finite and stopped the samples {stopped} at their best so far: lower "
                "learning_rate, bound max_grad_norm, or run in float32.",
                stacklevel=4,
            )


def _check_drawn_alone(before: torch.Generator, after: torch.Generator, noise: Tensor) -> None:
    """Whether the initial noise (B, *D) is all that a call has drawn of its one generator, so that parts of its samples draw what the whole does.

    Raises:
        ValueError: it has drawn more.
    """
    own = copied(before)
    torch.randn(noise.shape, generator=own, dtype=noise.dtype, device=own.device)
    if not torch.equal(own.get_state(), after.get_state()):
        raise ValueError(
            "One generator draws for all samples, and more than their initial noise (a solver with noise, a picture that is encoded), so that samples which "
            "are optimised in parts would not start from the stock call's: give a list of generators, one for each, or leave batch_size out (and optimizer "
            "'lbfgs', which takes one at a time)."
        )


def _checked_steps(grad_steps: list[int], steps: range) -> list[int]:
    if not grad_steps or any(k not in steps for k in grad_steps):
        raise ValueError(f"grad_steps are some of the {len(steps)} solver steps 0 to {len(steps) - 1}, at least one; got {grad_steps}.")
    return list(grad_steps)


_NO_GRADIENT = (
    "The reward has no gradient with respect to the images: it detaches them, runs under torch.no_grad, or goes through NumPy or PIL. Search over noise "
    "with best-of-n (search='zero_order'), which needs none."
)


def _gradient(rollout: DifferentiableRollout, rewards: Tensor, first: bool) -> Tensor:
    """Of the rewards with respect to the noise, (b, *D) float32; where the graph is cut, what cuts it."""
    # The solver's own path from the noise may be whole where the denoiser's is cut, and would be half a gradient.
    if cut := [k for k, step in rollout.steps.items() if not step.model_output.requires_grad]:
        raise GuidanceError(f"The denoiser's output has no graph at solver steps {cut}: it runs under torch.no_grad, detaches, or a cache answers for it.")
    if not rollout.latents.requires_grad:
        raise GuidanceError("The pipeline cuts the graph between its initial noise and its final latents: its loop or its solver detaches them.")
    if not rollout.images.requires_grad:
        raise GuidanceError("The final latents have a graph, the images have none: the decoder detaches them, or runs under torch.no_grad.")
    if not rewards.requires_grad:
        raise GuidanceError(_NO_GRADIENT)
    half = torch.float16 in (rollout.noise.dtype, rollout.latents.dtype, rollout.images.dtype)
    with torch.enable_grad():
        total = rewards.sum()
    (slope,) = scaled_gradients(total, [rollout.noise], half=half)
    if slope is None:
        raise GuidanceError("The final latents do not depend on the initial noise: the pipeline's loop or its solver detaches it on the way.")
    if first and not bool(slope.any()):
        why = " Half precision rounds small ones to 0, too: try float32." if half else ""
        raise GuidanceError(f"The reward's gradient with respect to the noise is exactly 0: it rounds, saturates, or does not look at the images.{why}")
    return slope.float()


def _size(x: Tensor) -> Tensor:
    """Root mean square of each sample, (B,)."""
    return x.flatten(1).square().mean(1).sqrt()
