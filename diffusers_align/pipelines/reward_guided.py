"""Reward guidance as a diffusers pipeline: any stock pipeline, on its own solver, climbs any differentiable reward while it samples.

The algorithm's page, with the presets, is `algorithms/guidance.py`; how a step is guided, `pipelines/guided_sampling.py`.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..algorithms.guidance import Guidance, Level
from ..algorithms.guidance import preset as find_preset
from ..checks.ranges import Count, Probability, checked
from ..condition import Condition
from ..driving.chains import SEVERAL_CHAINS, Chains
from ..driving.outcome import Outcome, by_sample, images_of
from ..driving.safety_checker import unchecked
from ..driving.scheduler_hook import OTHER_NUMBER, Step
from ..policy import noise_seed
from .base import WrappedPipeline
from .callbacks import check_last_step
from .draws import Generators, copied, noted
from .guided_sampling import GuidanceError, Objective, guided_sample
from .judge import Judge


class RewardGuidedPipeline(WrappedPipeline):
    """A stock pipeline that follows the gradient of a reward.

    >>> pipe = RewardGuidedPipeline(DiffusionPipeline.from_pretrained(...), reward="clip_score")  # doctest: +SKIP
    >>> output = pipe("a fox", preset="dps", reward_scale=2.0, num_inference_steps=30)  # doctest: +SKIP
    >>> output.images, output.rewards  # doctest: +SKIP
    """

    @checked
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        preset: str | Guidance = "dps",
        reward=None,
        reward_scale: float = 1.0,
        start: Probability | None = None,
        stop: Probability | None = None,
        recurrence: Count | None = None,
        guidance_overrides: dict[str, Any] | None = None,
        columns: dict[str, list] | None = None,
        micro_batch_size: Count | None = None,
        gradient_checkpointing: bool = False,
        **arguments: Any,
    ):
        """Sample under guidance.

        Args:
            preset: a name of `algorithms.guidance.PRESETS`, or a `Guidance`.
            reward: a name or a callable (images, prompts, **columns) -> (B,), with a gradient; with the presets `classifier` and `glide_clip`
                a noise-aware callable (latents, prompts, alpha, sigma) -> (B,), log p(prompt | latents), its latents as the model sees them.
            reward_scale: lambda: samples lean to p(x) exp(lambda reward(x)). 0 is the plain pipeline, bit for bit. Norms change its unit.
            start, stop, recurrence, guidance_overrides: in the place of the preset's own fields (`Guidance`).
            columns: other arguments of the reward, a list for each with an entry per prompt.
            micro_batch_size: samples decoded and scored at once for their gradient. A pipeline that draws beside its noise (inpainting) draws otherwise there,
                if a single generator draws for several prompts.
            gradient_checkpointing: the denoiser computes its activations again on the way back: less memory, more time.
            arguments: the stock call's.

        Returns:
            The stock output with two entries more: `rewards` (B,) float32 of the finished samples (not for a noise-aware reward, which judges no
            images), and `guided_values` (B, guided steps), s of the estimate before each guided step (not where nothing was guided). With
            `return_dict=False`, the stock tuple with what there is of the two.

        Raises:
            ValueError: no reward or prompt, unknown arguments or names, a solver that has no conversion.
            GuidanceError: a reward without gradient, a cut graph, latents that overflow.
        """
        fields = {"start": start, "stop": stop, "recurrence": recurrence, **(guidance_overrides or {})}
        guidance = _chosen(preset, {name: value for name, value in fields.items() if value is not None})
        condition, generator = self.condition(prompt, arguments)
        if guidance.noisy and not callable(self.reward if reward is None else reward):
            raise ValueError("This preset follows a noise-aware reward: pass reward=, a callable (latents, prompts, alpha, sigma) -> (B,).")
        judge, before = self.judge(reward, condition, columns), copied(generator)
        tail = _Tail.of(self, condition, noted(generator, self.pipeline._execution_device))
        asked, rest = self.asked(prompt, arguments)
        call = {**asked.arguments(self.calls.parameters), **rest}
        with self.progress_bar(total=1) as bar:
            sampled = guided_sample(
                self.pipeline, call, _noise_aware(judge) if guidance.noisy else _of_images(judge, tail), guidance, scale=float(reward_scale),
                seeds=lambda size: noise_seeds(before, size), micro_batch_size=micro_batch_size, gradient_checkpointing=gradient_checkpointing,
                on_progress=_shown(bar), memory=self.prompt_memory,
            )  # fmt: skip
        values = {} if sampled.values is None else {"guided_values": sampled.values}
        if guidance.noisy:
            return self.extended(sampled.output, **values)
        check_last_step(call)
        everything = list(range(len(condition)))
        return self.extended(sampled.output, rewards=replace(judge, on_invalid="mask")(tail.images(sampled.final, everything), everything), **values)


class _Tail(WrappedPipeline):
    """Decodes in the middle of a call: a copy of the pipeline with a solver of its own, since the other is at work, and as few gated
    steps as its loop allows."""

    @classmethod
    def of(cls, guided: RewardGuidedPipeline, condition: Condition, generator: Generators) -> _Tail:
        pipeline = copy.copy(guided.pipeline)
        for name, scheduler in guided.calls.schedulers.items():
            setattr(pipeline, name, copy.deepcopy(scheduler))
        tail, arguments = cls(pipeline), {**condition.kwargs, **condition.per_sample}
        parameters = tail.calls.parameters
        fixed = not tail.calls.starts_from_noise(arguments) or {"sigmas", "timesteps", "denoising_start", "denoising_end"} & set(arguments)
        few = {} if fixed or "num_inference_steps" not in parameters else {"num_inference_steps": 2}
        quiet = {name: None for name in ("callback_on_step_end", "callback", "latents") if name in arguments}
        overrides = {**few, **quiet, "output_type": "pt", "return_dict": True}  # some return no tuple, but the pictures
        tail.prompt_memory, tail.given = guided.prompt_memory, (condition, generator, overrides)
        return tail

    def images(self, latents: Tensor, rows: list[int]) -> Tensor:
        """Of latents (b, *D) for these rows of the batch: (b, 3, H, W) or (b, F, 3, H, W) in [0, 1], or sounds (b, C, T), with the graph if autograd
        is on. The sound of a video is another scheduler's part, and has none."""
        condition, generator, overrides = self.given
        if max(rows) >= len(condition):
            raise ValueError(OTHER_NUMBER.format(f"at least {max(rows) + 1}", len(condition)))
        own, begun = copied(_rows(generator, rows)), []
        chains = Chains()

        def put(step: Step) -> Tensor:
            begun.append(True)
            chain = chains.of(step)
            if chain[0] == 0 and len(latents) != len(step.sample):
                raise ValueError(OTHER_NUMBER.format(len(step.sample), len(latents)))
            if chain[0] == 0 and (chain[1] > 0 or latents.shape != step.sample.shape):
                raise GuidanceError(SEVERAL_CHAINS.format("guided samplings"))
            step.skip()
            return latents.to(step.sample.dtype) if step.child == 0 else step.sample

        graph = torch.is_grad_enabled()
        try:
            with unchecked(self.pipeline):  # what is handed out passes the original's
                output = self.drive(condition.select(rows), own, put, gradients=graph, needs_denoiser=lambda k: False, **overrides)
                return by_sample(Outcome(images_of(output)), len(rows)).images
        except (ValueError, IndexError):
            if begun or not {"num_inference_steps", "latents"} & set(overrides):
                raise
        # Some models know one number of steps, some pipelines go on from the latents that they are given.
        self.given = condition, generator, {name: value for name, value in overrides.items() if name not in ("num_inference_steps", "latents")}
        return self.images(latents, rows)


def _chosen(preset: str | Guidance, overrides: dict[str, Any]) -> Guidance:
    return find_preset(preset, **overrides) if isinstance(preset, str) else replace(preset, **overrides)


def _of_images(judge: Judge, tail: _Tail) -> Objective:
    return lambda latents, rows, level: judge(tail.images(latents, rows), rows)


def _noise_aware(judge: Judge) -> Objective:
    def objective(latents: Tensor, rows: list[int], level: Level) -> Tensor:
        weights = (torch.full((len(latents),), weight, device=latents.device) for weight in level)
        return judge.reward(latents, [judge.condition.prompts[i] for i in rows], *weights)

    return objective


def _rows(generator: Generators, rows: list[int]) -> Generators:
    return [generator[i] for i in rows] if isinstance(generator, list) else generator


def noise_seeds(generator: Generators, size: int) -> list[int]:
    """Of the noise that guidance draws, so that the call's own draws stay what they are."""
    if isinstance(generator, list):
        return [noise_seed(_number_of(g), "guidance") for g in generator]
    start = torch.randint(2**62, ()).item() if generator is None else _number_of(generator)
    return [noise_seed(start, "guidance", i) for i in range(size)]


def _number_of(generator: torch.Generator) -> int:
    """Its seed; of one that has drawn since, what it would draw, so that one generator for several calls gives each of them noise of its own."""
    own, seed = copied(generator), generator.initial_seed()
    fresh = torch.equal(own.get_state(), torch.Generator(own.device).manual_seed(seed).get_state())
    return seed if fresh else int(torch.randint(2**62, (), generator=own, device=own.device))


def _shown(bar):
    def on_progress(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return on_progress
