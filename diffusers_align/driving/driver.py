"""Calls of a stock pipeline: what they are given, and how they are made."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..checks.given_names import did_you_mean
from ..checks.ranges import Count, check_call, checked
from ..condition import Condition, belongs_to_samples, is_embedding, number_of_samples
from ..schedulers.scheduling_utils import SDESchedulerMixin
from .noise import noise_seed
from .prompt_memory import PromptMemory, Store
from .safety_checker import unchecked
from .steps import denoisers, drive, encoded_prompt

logger = logging.get_logger(__name__)

# What a policy's methods set in each call, and the value that says nothing else. None is the pipeline's own default for all of them.
_ONE_OUTPUT = (1, "it makes one sample a prompt; repeat the prompts, with other seeds.")
_SET_BY_POLICY = {
    "prompt": (None, "prompts are the first argument."),
    "generator": (None, "seeds= fixes the draws of each sample."),
    "output_type": (None, "roll-outs keep latents, and decode makes pictures of them."),
    "return_dict": (True, "the policy reads the output."),
    "eta": (None, "the noise of the steps is the SDE scheduler's: Policy(pipe, sde_twin(pipe.scheduler, eta=...)), or deterministic=True."),
    **dict.fromkeys(("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt"), _ONE_OUTPUT),
}


class Calls:
    """A pipeline whose scheduler is an SDE scheduler, and the calls of it.

    Args:
        pipeline: any diffusers pipeline.
        call_kwargs: arguments of every call, which a condition's own override.
    """

    def __init__(self, pipeline, call_kwargs: dict[str, Any]):
        self.pipeline, self.call_kwargs = pipeline, call_kwargs
        self._parameters = dict(inspect.signature(type(pipeline).__call__).parameters)
        self._memory = PromptMemory()
        self._embeddings: Condition | None = None
        self._warned: set[str] = set()
        self._streams: list[torch.Generator] | None = None

    @property
    def scheduler(self) -> SDESchedulerMixin:
        return self.pipeline.scheduler

    @property
    def denoisers(self) -> dict[str, nn.Module]:
        """The networks that are trained, by component name."""
        return denoisers(self.pipeline)

    @property
    def device(self) -> torch.device:
        return next(iter(self.denoisers.values())).device

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
        """The call for these prompts. They are encoded at first use and remembered for replays.

        Args:
            prompts: B strings, or one. With `prompt_embeds` they are what rewards read, and may be None (then "").
            seeds, step_seeds: B whole numbers, see `rollout`.
            per_sample: other arguments of the call of which each sample has its own, by name: a list of B values (pictures, masks, sizes), a
                tensor of B rows, or a string for all. What stock diffusers defines as one a prompt (`prompt_2`, `negative_prompt`,
                `prompt_embeds`, `latents` ...) is so without being named here.
            call_kwargs: arguments that all samples share, whatever their length.

        Raises:
            ValueError: no prompts, a number of seeds or per-sample values that is not theirs, an argument that the pipeline's call lacks or that
                the policy sets itself.
        """
        name, own = type(self.pipeline).__name__, per_sample or {}
        _check_arguments(name, self._parameters, {**self.call_kwargs, **call_kwargs}, own, set(call_kwargs))
        kwargs = {argument: value for argument, value in {**self.call_kwargs, **call_kwargs}.items() if argument not in own}
        given = checked_prompts(prompts) if prompts is not None else unknown_prompts(name, self._parameters, kwargs, own, seeds)
        condition = Condition(given, kwargs, seeds, step_seeds, own)
        for argument in _maybe_of_samples(condition):
            if argument not in self._warned:
                self._warned.add(argument)
                logger.warning(
                    f"{argument}: a list of {len(condition)} for {len(condition)} prompts is taken for all of each sample's, as pipelines with several "
                    f'references have it. If each belongs to one prompt, say so: per_sample={{"{argument}": [...]}}.'
                )
        if condition.embedded:
            self._embeddings = condition
        return condition

    def _any_condition(self, size: int) -> Condition:
        """A call of `size` samples whose prompts do not matter: empty ones, or the latest embeddings that were given in the place of prompts."""
        seeds = list(range(size))
        if self._embeddings is not None:
            return replace(self._embeddings.select([i % len(self._embeddings) for i in seeds]), seeds=seeds, step_seeds=None)
        encoders = [component for name, component in self.pipeline.components.items() if name.startswith("text_encoder")]
        if encoders and all(encoder is None for encoder in encoders):
            raise ValueError(f"This {type(self.pipeline).__name__} has no text encoder: give a condition, policy.condition(None, prompt_embeds=...).")
        return self.condition([""] * size, seeds=seeds)

    @checked
    def remember_prompts(self, batches: Count, store: Store | None = None) -> None:
        """Keep the encoded prompts of that many batches (32 at first; fewer than a loop visits in turn are none at all), and of all in `store`."""
        self._memory.size, self._memory.store = batches, store

    def prompt_features(self, condition: Condition) -> Tensor:
        """One vector a sample, (B, E) float32: the pipeline's encoded prompt, averaged over its tokens.

        Each prompt is encoded by itself: padded to a batch's longest, it would depend on the others. Where guidance makes the
        pipeline return the negative prompt in the same tensor, that is averaged in.

        Raises:
            ValueError: the pipeline has no `encode_prompt`.
        """
        encoded = [encoded_prompt(self.pipeline, self._call(condition.select([i]))) for i in range(len(condition))]
        return torch.stack([_pooled(e) for e in encoded])

    def _call(self, condition: Condition, **overrides: Any) -> dict[str, Any]:
        call = condition.arguments(self._parameters)
        if "generator" in self._parameters and condition.seeds is not None:
            call["generator"] = [torch.Generator("cpu").manual_seed(seed) for seed in condition.seeds]
        if "output_type" in self._parameters:
            call["output_type"] = "latent"
        return {**call, **overrides}

    def _drive(self, condition: Condition, on_step, *, needs_denoiser=None, timesteps=None, **overrides: Any):
        with unchecked(self.pipeline):
            return drive(
                self.pipeline, on_step, self._call(condition, **overrides), gradients=torch.is_grad_enabled(),
                timesteps=timesteps, needs_denoiser=needs_denoiser, memory=self._memory, noise=self._streams, global_seed=_global_seed(condition),
            )  # fmt: skip


def _maybe_of_samples(condition: Condition) -> list[str]:
    """Shared lists of as many pictures as there are samples: stock pipelines take some of them one a prompt."""
    number = len(condition)
    lists = {name: value for name, value in condition.kwargs.items() if isinstance(value, (list, tuple)) and len(value) == number > 1}
    return [name for name, value in lists.items() if all(hasattr(item, "shape") or hasattr(item, "getpixel") for item in value)]


def _global_seed(condition: Condition) -> int | None:
    """Of what a call draws from torch's global generators: the same whenever the condition is walked."""
    return None if condition.seeds is None else noise_seed(condition.seeds, "global")


def _check_arguments(pipeline: str, accepted: Collection[str], shared: dict[str, Any], per_sample: dict[str, Any], given: Collection[str]) -> None:
    """Refuse arguments of a call that would be overwritten or lost.

    Args:
        pipeline: its name, for messages.
        accepted: the names that its call takes.
        shared, per_sample: the arguments; those of `shared` that are not `given` with this call are defaults, which `per_sample` overrides.

    Raises:
        ValueError: an argument that the call lacks, that a policy sets itself, or that is given twice.
    """
    if not isinstance(per_sample, dict):
        raise ValueError(f'per_sample is a dict of arguments by name, {{"image": [...]}}, got a {type(per_sample).__name__}.')
    if twice := sorted(set(per_sample) & set(given)):
        raise ValueError(f"{', '.join(twice)}: given for all samples and in per_sample. Give it once.")
    everything = {**shared, **per_sample}
    for name in sorted(set(everything) & set(_SET_BY_POLICY)):
        harmless, reason = _SET_BY_POLICY[name]
        if everything[name] is not None and everything[name] is not harmless:
            raise ValueError(f"{name} cannot be an argument of a policy's call: {reason}")
    check_call(everything)
    if unknown := sorted(set(everything) - set(accepted)):
        names = [name for name in accepted if name not in ("self", "args", "kwargs")]
        near = "".join(did_you_mean(name, names) for name in unknown)
        raise ValueError(f"{pipeline}'s call has no {', '.join(unknown)}.{near} It takes {', '.join(names)}.")
    if (images := per_sample.get("ip_adapter_image")) is not None and len(images) > 1:
        raise ValueError(
            "ip_adapter_image cannot be per_sample: pipelines take several images of an adapter as all of one prompt's. Give ip_adapter_image_embeds, "
            "for each sample what pipeline.prepare_ip_adapter_image_embeds makes of its image."
        )


def checked_prompts(prompts: str | Iterable[str]) -> list[str]:
    """Prompts as a list.

    Raises:
        ValueError: none, or something else than strings.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise ValueError("No prompts: give at least one.")
    if strange := [prompt for prompt in prompts if not isinstance(prompt, str)]:
        raise ValueError(f"Prompts are strings, got {strange[0]!r}.")
    return prompts


def unknown_prompts(pipeline: str, accepted: Collection[str], shared: dict[str, Any], per_sample: dict[str, Any], seeds: list[int] | None) -> list[str]:
    """As many empty strings as a call has samples that needs no prompts: embeddings stand in their place, or the pipeline takes none.

    Raises:
        ValueError: the pipeline needs prompts, or nothing says how many samples there are.
    """
    own = {name: value for name, value in shared.items() if value is not None and belongs_to_samples(name)} | per_sample
    if "prompt" in accepted and not any(map(is_embedding, own)):
        raise ValueError(f"No prompts: {pipeline} takes prompts, or prompt_embeds and what belongs to them in their place.")
    if (number := number_of_samples(own, seeds)) is None:
        raise ValueError("No prompts, and nothing else that says how many samples to make: give seeds, or arguments per_sample.")
    return [""] * number


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
        raise ValueError("encode_prompt returned no sequence of vectors, so the prompts have no features; do without them (--no-value_baseline).")
    return sequences[0].detach().float().flatten(0, -2).mean(0)
