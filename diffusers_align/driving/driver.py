"""The driver: a stock pipeline, and calls of it in which each scheduler step is handed to a callback."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModularPipeline
from diffusers.utils import logging
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..checks.ranges import Count, checked
from ..condition import Condition
from ..schedulers.scheduling_utils import SDESchedulerMixin
from ..schedulers.twin import sde_twins
from . import scheduler_hook
from .arguments import check_arguments, check_levels, checked_prompts, maybe_of_samples, own_levels, unknown_prompts
from .calls import calls_of
from .denoisers import denoisers as denoisers_of
from .encoder_state import encoder_state
from .encoders_away import EncodersAway, KeptOnCPU
from .module_tree import device_of
from .noise import noise_seed, step_streams
from .one_chain import check_one_chain
from .portions import refuse_portions
from .prompt_memory import PromptMemory, Store, encoded_prompt
from .replacements import held, reads_levels_by_number, replaced
from .safety_checker import unchecked

logger = logging.get_logger(__name__)


class Driver:
    """A pipeline whose scheduler is an SDE scheduler, its prompt memory, its streams of noise, and the calls of it. `Policy` is a driver.

    `condition` says what a call is given, `noise` what its steps draw with, and `drive` makes the call:

    >>> condition = driver.condition(["a fox"], seeds=[1], num_inference_steps=10)  # doctest: +SKIP
    >>> with driver.noise(condition, deterministic=False):  # doctest: +SKIP
    ...     output = driver.drive(condition, lambda step: print(step.k, step.timestep))
    >>> images_of(output)  # doctest: +SKIP

    Args:
        pipeline: any diffusers pipeline, classic or modular. It keeps its scheduler: calls of the driver have another one for as long as they last.
        scheduler: an SDE scheduler; the SDE twin of the pipeline's own by default.
        call_kwargs: arguments of every call, which a condition's own override. With `timesteps` or `sigmas` among them the twin follows the levels of the
            pipeline's own scheduler, which takes them.

    Attributes:
        schedulers: those of this driver's calls, by component name: the SDE twins, or a stock solver for a while (`stock.stock_solver`).
        stock_scheduler: what the pipeline came with.
        calls: how a pipeline of this kind, classic or modular, is called.
        parameters: of the pipeline's call, by name, as `inspect.signature` has them.
        prompt_memory: what `encode_prompt` returned in earlier calls.
        steps_apart: of kinds of calls, whether the graphs of their steps hang together (`driving.steps_apart`).
        lockstep: processes wait for each other at each denoiser call, as they do when it is sharded: the number of calls then depends
            on shapes alone.

    Raises:
        TypeError: the name of a pipeline, a scheduler that returns no log-probabilities, or a pipeline that is wrapped around another.
        ValueError: a pipeline without scheduler, whose scheduler has no SDE twin, that hands its scheduler the noise of each step, or whose steps are no
            chain of states (`driving.one_chain`); `timesteps` or `sigmas` that no twin follows.
    """

    def __init__(self, pipeline, scheduler: SDESchedulerMixin | None = None, call_kwargs: dict[str, Any] | None = None):
        if scheduler is not None and not isinstance(scheduler, SDESchedulerMixin):
            raise TypeError(f"{type(scheduler).__name__} returns no log-probabilities; pass sde_twin(scheduler) or leave it out.")
        if isinstance(inside := getattr(pipeline, "__dict__", {}).get("pipeline"), (DiffusionPipeline, ModularPipeline)):
            raise TypeError(f"{type(pipeline).__name__} is wrapped around a {type(inside).__name__}, which is the policy: Policy(pipe.pipeline).")
        self.calls = calls_of(pipeline)
        self.calls.check_schedulers()
        check_one_chain(self.calls)
        scheduler_hook.check_draws(self.calls)
        self.pipeline, self.call_kwargs, self.lockstep = pipeline, call_kwargs or {}, False
        by_sigmas = bool(own_levels(self.call_kwargs)) or reads_levels_by_number(self.calls.functions)
        self.stock_schedulers = self.calls.schedulers
        self.schedulers = sde_twins(self.stock_schedulers, scheduler, by_sigmas=by_sigmas)
        check_levels(self.call_kwargs, self.scheduler, self.stock_scheduler)
        self.parameters = self.calls.parameters
        self.prompt_memory = PromptMemory()
        self._embeddings: Condition | None = None
        self.steps_apart: dict[tuple, bool] = {}
        self._warned: set[str] = set()
        self._streams: list[torch.Generator] | None = None

    @property
    def scheduler(self) -> SDESchedulerMixin:
        return next(iter(self.schedulers.values()))

    @property
    def stock_scheduler(self):
        """The main one of those that the pipeline came with."""
        return next(iter(self.stock_schedulers.values()))

    @stock_scheduler.setter
    def stock_scheduler(self, scheduler) -> None:
        self.stock_schedulers[next(iter(self.stock_schedulers))] = scheduler

    @property
    def denoisers(self) -> dict[str, nn.Module]:
        """The networks that are trained, by component name."""
        return denoisers_of(self.pipeline)

    @property
    def device(self) -> torch.device:
        return device_of(next(iter(self.denoisers.values())))

    # --- conditions ------------------------------------------------------------------------------------------------

    def condition(
        self,
        prompts: str | list[str] | None,
        *,
        seeds: list[int] | None = None,
        step_seeds: list[int] | None = None,
        per_sample: dict[str, Any] | None = None,
        **call_kwargs: Any,
    ) -> Condition:
        """The call for these prompts. They are encoded at first use and remembered for replays, as long as the text encoders stay as they are.

        Args:
            prompts: B strings, or one. With `prompt_embeds` they are what rewards read, and may be None (then "").
            seeds: B whole numbers, each of which fixes its sample's initial noise and every draw.
            step_seeds: B of the steps' noise alone, for samples that share their initial noise.
            per_sample: other arguments of the call of which each sample has its own, by name: a list of B values (pictures, masks, sizes), a
                tensor of B rows, or a string for all. What stock diffusers defines as one per prompt (`prompt_2`, `negative_prompt`,
                `prompt_embeds`, `latents` ...) is so without being named here.
            call_kwargs: arguments that all samples share, whatever their length.

        Raises:
            ValueError: no prompts, a number of seeds or per-sample values that is not theirs, an argument that the pipeline's call lacks or that
                is set here.
        """
        name, own = type(self.pipeline).__name__, per_sample or {}
        check_arguments(name, self.parameters, {**self.call_kwargs, **call_kwargs}, own, set(call_kwargs))
        kwargs = {argument: value for argument, value in {**self.call_kwargs, **call_kwargs}.items() if argument not in own}
        check_levels(kwargs, self.scheduler, self.stock_scheduler)
        given = checked_prompts(prompts) if prompts is not None else unknown_prompts(name, self.parameters, kwargs, own, seeds)
        condition = Condition(given, kwargs, seeds, step_seeds, own)
        for argument in maybe_of_samples(condition):
            if argument not in self._warned:
                self._warned.add(argument)
                logger.warning(
                    f"{argument}: a list of {len(condition)} for {len(condition)} prompts is taken for all of each sample's, as pipelines with several "
                    f'references have it. If each belongs to one prompt, say so: per_sample={{"{argument}": [...]}}.'
                )
        if condition.embedded:
            self._embeddings = condition
        return condition

    def any_condition(self, size: int) -> Condition:
        """A call of `size` samples whose prompts do not matter: empty ones, or the latest embeddings that were given in the place of prompts.

        Raises:
            ValueError: the pipeline has no text encoder, and no embeddings were given yet; or it needs more than prompts (a picture).
        """
        seeds = list(range(size))
        if self._embeddings is not None:
            return replace(self._embeddings.select([i % len(self._embeddings) for i in seeds]), seeds=seeds, step_seeds=None)
        encoders = [component for name, component in self.pipeline.components.items() if name.startswith("text_encoder")]
        if encoders and all(encoder is None for encoder in encoders):
            raise ValueError(f"This {type(self.pipeline).__name__} has no text encoder: give a condition, policy.condition(None, prompt_embeds=...).")
        return self.condition([""] * size, seeds=seeds)

    @checked
    def remember_prompts(self, batches: Count, store: Store | None = None) -> None:
        """Cache the encoded prompts of the last `batches` batches, 32 at first, and of all in `store`. Fewer than a loop visits in turn never help. A prompt
        that comes more than once in a batch is encoded once from now on, which rounds otherwise than the stock call does."""
        memory = self.prompt_memory
        memory.size, memory.store, memory.once_each = batches, store or (memory.store if memory.encoders else None), True

    def offload_text_encoders(self) -> None:
        """Keep the pipeline's text encoders on the CPU: they are on the device only while they encode, and what they make of each prompt is kept on the CPU
        (the latest 8 GB of it). Prompts are encoded one by one from now on, which rounds otherwise than a batch of them does.

        Raises:
            ValueError: there are none, or the pipeline has no `encode_prompt` to keep the results of.
        """
        if not self.calls.encodes:
            raise ValueError(f"{self.calls.name} has no encode_prompt, so it runs its text encoders in each call: leave out --offload_text_encoders.")
        memory = self.prompt_memory
        memory.encoders = memory.encoders or EncodersAway(self.pipeline, self.device)
        memory.store = memory.store or KeptOnCPU()

    def expect_prompts(self, prompts: Iterable[str]) -> None:
        """What conditions will ask for, until other prompts are announced: text encoders that are off the device encode them in one visit."""
        self.prompt_memory.expected = list(prompts)

    @checked
    def prompt_features(self, condition: Condition) -> Tensor:
        """One vector a sample, (B, E) float32: the pipeline's encoded prompt, averaged over its tokens.

        Each prompt is encoded by itself: padded to a batch's longest, it would depend on the others. After `remember_prompts` it is encoded once for all
        calls. Where guidance makes the pipeline return the negative prompt in the same tensor, that is averaged in.

        Raises:
            ValueError: the pipeline has no `encode_prompt`.
        """
        memory = self.prompt_memory if self.prompt_memory.encoders else None

        def compute(part: Condition) -> Tensor:
            return _pooled(encoded_prompt(self.pipeline, self.call(part), memory))

        parts = [condition.select([i]) for i in range(len(condition))]
        place = [*(getattr(self.pipeline, name, None) for name in ("dtype", "device")), encoder_state(self.pipeline)]
        return torch.stack([self.prompt_memory.feature(part.arguments(self.parameters), partial(compute, part), *place) for part in parts])

    # --- calls -----------------------------------------------------------------------------------------------------

    def call(self, condition: Condition, **overrides: Any) -> dict[str, Any]:
        """The keyword arguments of the pipeline's call for `condition`: a fresh generator a sample where it has seeds, final latents as output,
        and `overrides` in the place of any argument."""
        call = condition.arguments(self.parameters)
        if "generator" in self.parameters and condition.seeds is not None:
            call["generator"] = [torch.Generator("cpu").manual_seed(seed) for seed in condition.seeds]
        if "output_type" in self.parameters:
            call["output_type"] = "latent"
        return {**call, **overrides}

    @contextmanager
    def noise(self, condition: Condition, deterministic: bool) -> Iterator[None]:
        """Context: the steps of `drive` draw from streams of their own, fixed by the condition's `step_seeds` or `seeds`: pipelines may or may not
        draw from theirs in between, or hand them on. The streams begin with the context; a second call inside draws on. What was set before
        is back afterwards, so that contexts can be nested.

        A stock solver draws as in a stock call, unless the condition has seeds for its steps.

        Args:
            deterministic: walk the ODE; no step draws then. A sampler that has noise of its own and no ODE draws still, as in a stock call.
        """
        schedulers, streams = self.schedulers.values(), self._streams
        before = [getattr(scheduler, "deterministic", False) for scheduler in schedulers]
        as_stock = not isinstance(self.scheduler, SDESchedulerMixin) or (deterministic and self.scheduler.own_noise)
        self._streams = step_streams(condition.step_seeds or (None if as_stock else condition.seeds))
        for scheduler in schedulers:
            scheduler.deterministic = deterministic
        try:
            yield
        finally:
            self._streams = streams
            for scheduler, was in zip(schedulers, before):
                scheduler.deterministic = was

    @contextmanager
    def denoising(self, call: Callable) -> Iterator[None]:
        """Context: each denoiser's `forward(...)` is `call(forward, ...)`. What gates close is not called."""
        with ExitStack() as stack:
            for module in self.denoisers.values():
                stack.enter_context(replaced(module, "forward", call))
            yield

    @contextmanager
    def schedulers_in_place(self) -> Iterator[None]:
        """Context: the pipeline has this driver's schedulers, whatever its users, or another policy of it, have put there."""
        with ExitStack() as stack:
            for name, scheduler in self.schedulers.items():
                stack.enter_context(held(self.pipeline, name, scheduler))
            yield

    def drive(
        self,
        condition: Condition,
        on_step: Callable[[scheduler_hook.Step], Tensor | None],
        *,
        needs_denoiser: Callable[[int], bool] | None = None,
        timesteps: Tensor | None = None,
        **overrides: Any,
    ):
        """Call the pipeline for `condition` and hand each of its scheduler's steps to `on_step`, with gradients if autograd is on.

        Encoded prompts are remembered, and no safety checker is asked. A condition with seeds starts from the same noise whenever it is driven;
        the noise of its steps is fixed inside a `noise` context of its own. The pipeline, its models, its scheduler, torch's global generators
        and the condition are as before when this returns or raises.

        Args:
            on_step: gets a `Step` with its state and the model's output, (B, *D) each. What it returns (B, *D) becomes the next state; None lets
                the scheduler's own step stand.
            needs_denoiser: of solver step k, whether its denoiser calls must be real; others return zeros at no cost. None: all are.
            timesteps: stand in for the scheduler's own; rows of (N, B) give each sample its own time.
            overrides: arguments of the call in the place of the condition's, such as `output_type="pt"`.

        Returns:
            The pipeline's output. Its first entry has the final latents, or what `output_type` asks for: see `outcome.images_of`.

        Raises:
            ValueError: gradients through an offloaded component, a pipeline that reads what the scheduler does not have. What the pipeline or
                `on_step` raises comes through.
        """
        with self.schedulers_in_place(), unchecked(self.pipeline):
            return scheduler_hook.drive(
                self.pipeline, on_step, self.call(condition, **overrides), gradients=torch.is_grad_enabled(), timesteps=timesteps,
                needs_denoiser=needs_denoiser, memory=self.prompt_memory, noise=self._streams, global_seed=_global_seed(condition),
            )  # fmt: skip

    def refuse_portions(self, condition: Condition, what_to_do: str) -> None:
        """Raise a ValueError if the pipeline, which walks several schedules in a call, walks each of them for a portion of the sample alone."""
        condition = condition if condition.seeds is not None else replace(condition, seeds=list(range(len(condition))))
        refuse_portions(self.pipeline, lambda on_step: self.drive(condition, on_step, needs_denoiser=lambda k: False, output_type="pt"), what_to_do)


def _global_seed(condition: Condition) -> int | None:
    """Of what a call draws from torch's global generators: the same whenever the condition is walked."""
    return None if condition.seeds is None else noise_seed(condition.seeds, "global")


def seeded(condition: Condition, generator: torch.Generator | None) -> Condition:
    """The condition with seeds: its own, or drawn from `generator` (None: torch's global one).

    Raises:
        ValueError: it has seeds, which fix every draw, and a generator is given.
        TypeError: `generator` is none.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator is one torch.Generator, which draws a seed for each sample, got a {type(generator).__name__}; or give seeds.")
    if condition.seeds is not None:
        if generator is not None:
            raise ValueError("The seeds fix every draw, so that the generator would be ignored: leave one of them out.")
        return condition
    drawn = torch.randint(2**62, (len(condition),), generator=generator, device=generator.device if generator else "cpu")
    return replace(condition, seeds=drawn.tolist())


def _pooled(encoded) -> Tensor:
    """The mean (E,) over all rows of the first sequence of vectors (..., E) in what `encode_prompt` returned."""
    sequences = [x for x in pytree.tree_leaves(encoded) if isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 1]
    if not sequences:
        raise ValueError("encode_prompt returned no sequence of vectors, so the prompts have no features for a learned value: choose another --advantage.")
    return sequences[0].detach().float().flatten(0, -2).mean(0)
