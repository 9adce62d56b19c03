"""Particles on a stock pipeline: many samples that stop together between two steps, are weighed and copied, and go on.

A pipeline's call cannot be paused. It is left instead, once its denoiser has answered at the step where to stop, and called again to
go on from there: the steps before are skipped with their denoiser calls gated, so no call is made twice. So there may be more
particles than fit into one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..condition import Condition
from ..driving.chains import SEVERAL_CHAINS, Chains
from ..driving.denoisers import denoisers
from ..driving.module_tree import caches
from ..driving.noise import noise_seed, step_streams
from ..driving.outcome import Outcome
from ..driving.scheduler_hook import NO_OWN_STEP, OTHER_NUMBER, Step
from ..transition import GaussianTransition
from .base import WrappedPipeline
from .draws import Generators


@dataclass(frozen=True)
class Particles:
    """B particles that stand before solver step k, where the denoiser has answered.

    Attributes:
        k: the step; None behind the last.
        states, outputs: (B, *D) of each scheduler of the pipeline (one, or more with several modalities); no outputs at the end.
        clean: (B, *D) predicted clean samples; the samples at the end.
        transition: the kernel of step k; None at the end, or where it is deterministic.
    """

    k: int | None
    states: list[Tensor]
    outputs: list[Tensor]
    clean: Tensor
    transition: GaussianTransition | None

    def select(self, index: list[int]) -> Particles:
        """Some of them, or copies: everything that belongs to a particle goes along."""
        kernel = self.transition and self.transition.select(index)
        states, outputs = ([x[index] for x in tensors] for tensors in (self.states, self.outputs))
        return replace(self, states=states, outputs=outputs, clean=self.clean[index], transition=kernel)

    def detached(self) -> Particles:
        """Without their graph."""
        kernel = self.transition and GaussianTransition(self.transition.mean.detach(), self.transition.std.detach())
        states, outputs = ([x.detach() for x in tensors] for tensors in (self.states, self.outputs))
        return replace(self, states=states, outputs=outputs, clean=self.clean.detach(), transition=kernel)

    @staticmethod
    def cat(parts: list[Particles]) -> Particles:
        """One batch of several that stand before the same step."""
        first = parts[0]
        kernel = first.transition and GaussianTransition.cat([p.transition for p in parts])
        states, outputs = ([torch.cat(x) for x in zip(*(getattr(p, name) for p in parts))] for name in ("states", "outputs"))
        return replace(first, states=states, outputs=outputs, clean=torch.cat([p.clean for p in parts]), transition=kernel)


class _Leave(Exception):
    """Ends a call whose answer is known."""


class Walk:
    """The way of B particles through a pipeline whose scheduler is an SDE scheduler, in calls of at most `batch_size`.

    Args:
        condition: of the B particles.
        seeds: B integers; each fixes the initial noise of its place and all noise of its steps: copies in different places part.
    """

    def __init__(self, wrapped: WrappedPipeline, condition: Condition, seeds: list[int], batch_size: int | None = None):
        for name, module in denoisers(wrapped.pipeline).items():
            if found := caches(module):
                raise ValueError(f"{name} has a {found[0]}, which calls that go on from others do not have: pipeline.{name}.disable_cache() switches it off.")
        self.wrapped, self.condition, self.seeds = wrapped, condition, seeds
        self.batch_size = batch_size or len(seeds)
        self._streams = step_streams(seeds)

    def batches(self) -> Iterator[list[int]]:
        """The particles of each call."""
        for start in range(0, len(self.seeds), self.batch_size):
            yield list(range(start, min(start + self.batch_size, len(self.seeds))))

    def noise(self, rows: list[int]) -> list[torch.Generator]:
        """What draws the steps' noise of these particles."""
        return [self._streams[i] for i in rows]

    def fresh(self, rows: list[int]) -> list[torch.Generator]:
        """What the pipeline itself draws with, from the start at each call."""
        return [torch.Generator().manual_seed(self.seeds[i]) for i in rows]

    @cached_property
    def stochastic_steps(self) -> list[bool]:
        """Of each solver step, whether its kernel has noise; looked up once, with gated denoiser calls."""
        found, chains = [], Chains()

        def look(step: Step) -> Tensor:
            if chains.of(step)[1] > 0:
                raise ValueError(SEVERAL_CHAINS.format("particles"))
            if step.child == 0 and len(step.sample) != 1:
                raise ValueError(OTHER_NUMBER.format(len(step.sample), 1))
            if step.child == 0:
                found.append(bool((step.run(prev_sample=step.sample).std > 0).any()))
            else:
                step.skip()
            return step.sample

        with torch.no_grad():
            self._drive([0], self.fresh([0]), look, needs_denoiser=lambda k: False)
        if not found:
            raise ValueError(NO_OWN_STEP)
        return found

    def advance(self, rows: list[int], start: Particles | None, stop: int | None, *, drawn: Tensor | None = None, gradients: bool = False) -> Particles:
        """Go on to solver step `stop` (None: to the end).

        Args:
            start: where these rows stand; None is the beginning.
            drawn: (B, *D), the next states, in the place of fresh draws from the kernel of the step where they stand.
            gradients: keep the graph from the state at `stop` to the predicted clean sample.
        """
        first, found, final = -1 if start is None else start.k, {}, {}

        def move(step: Step) -> Tensor | None:
            if step.k == stop:
                found[step.child] = (step.sample, step.model_output, step.run(prev_sample=step.sample.detach()))
                return step.sample
            if step.k < first:
                step.skip()
                return step.like(start.states[step.child])
            resumed = {"sample": step.like(start.states[step.child]), "model_output": start.outputs[step.child]} if step.k == first else {}
            if resumed and drawn is not None and step.child == 0:
                resumed["prev_sample"] = step.like(drawn)
            moved = step.run(**resumed, generator=self.noise(rows)).prev_sample
            final[step.child] = moved.detach()
            # A leaf before the denoiser that is asked next: its graph is one call's.
            return moved.detach().requires_grad_(gradients and step.k + 1 == stop)

        def needs_denoiser(k: int) -> bool:
            if stop is not None and k > stop:
                raise _Leave
            return k > first

        with suppress(_Leave), torch.set_grad_enabled(gradients):
            self._drive(rows, self.fresh(rows), move, needs_denoiser=needs_denoiser)
        return _arrived(stop, found) if stop is not None else _ended(final)

    def _drive(self, rows: list[int], generator: Generators, on_step: Callable, **options: Any) -> None:
        # Calls that go on from others must see what those drew from the global generators.
        seed = noise_seed([self.seeds[i] for i in rows], "global")
        graph = torch.is_grad_enabled()
        self.wrapped.drive(self.condition.select(rows), generator, on_step, gradients=graph, global_seed=seed, output_type="latent", **options)

    def decode(self, particles: Particles, rows: list[int]) -> Outcome:
        """What the predicted clean samples are like. The sound of a video is none on the way: another scheduler's state is noisy there."""
        made = self.wrapped.decode([particles.clean, *particles.states[1:]], self.condition.select(rows), self.fresh(rows))
        return made if particles.k is None or len(particles.states) == 1 else Outcome(made.images)


def _arrived(k: int, found: dict[int, tuple]) -> Particles:
    children = [found[child] for child in sorted(found)]
    output = found[0][2]
    kernel = GaussianTransition(output.prev_sample_mean, output.std) if bool((output.std > 0).any()) else None
    return Particles(k, [c[0] for c in children], [c[1] for c in children], output.pred_original_sample, kernel)


def _ended(final: dict[int, Tensor]) -> Particles:
    states = [final[child] for child in sorted(final)]
    return Particles(None, states, [], states[0], None)
