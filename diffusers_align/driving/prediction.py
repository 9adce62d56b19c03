"""The model's output at given latents and times, by the pipeline's own forward pass.

Two things differ between pipelines and are found out by trying, once: what switches guidance off (`guidance`), and whether the loop takes a
time for each sample.
"""

from __future__ import annotations

import inspect
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..condition import Condition
from .guidance import GuidanceSwitch, of_the_device
from .initial_noise import prepared_latents
from .of_driver import OfDriver
from .scheduler_hook import Step

if TYPE_CHECKING:
    from .driver import Driver

logger = logging.getLogger(__name__)


class Prediction(OfDriver):
    """`Policy.predict`, with what it has learned about the driver's pipeline."""

    def __init__(self, driver: Driver):
        super().__init__(driver)
        self._guidance = GuidanceSwitch(driver)
        self._own_times: bool | None = None
        self._edits = False
        self._reads_others: bool | None = None
        self._of_one_step: set[tuple] = set()

    def __call__(self, latents: Tensor, timesteps: Tensor, condition: Condition, guidance: bool) -> Tensor:
        """(B, *D) at `latents` (B, *D) and `timesteps` (B,); see `Policy.predict`."""
        self._check(latents, timesteps, len(condition))
        if self.driver.calls.takes_gradients:
            raise ValueError(
                f"{self.driver.calls.name} differentiates through its denoiser in each call and moves its latents by what it finds, so that predict would be "
                "of other latents than those given. Learn on replays (GRPO, DDPO), which make the whole call."
            )
        overrides = {} if guidance else self.guidance_off(condition)
        if guidance:
            self._check_guidance(latents, timesteps[0], condition)
        one_time = len(timesteps if self.driver.lockstep else set(timesteps.tolist())) == 1
        if not guidance and not one_time and self._own_times is None:
            self._own_times = self._takes_own_times(latents, timesteps, condition, overrides)
        if one_time:
            return self._together(latents, timesteps[0], condition, overrides)
        if self._own_times and not guidance:
            return self._together(latents, timesteps, condition, overrides)
        return self._one_by_one(latents, timesteps, condition, overrides)

    def _check(self, latents: Tensor, timesteps: Tensor, number: int) -> None:
        if len(latents) != number or timesteps.shape != (number,):
            raise ValueError(f"{number} prompts need latents and timesteps of as many, got {tuple(latents.shape)} and {tuple(timesteps.shape)}.")
        least, most = self.driver.scheduler.time_range
        slack = 1e-6 * (most - least)  # they may have been rounded to float32
        if not bool(((timesteps >= least - slack) & (timesteps <= most + slack)).all()):  # NaN fails too
            raise ValueError(f"timesteps are numbers from {least:g} to {most:g}, in the scheduler's units, got {timesteps.tolist()}.")

    @torch.no_grad()
    def _check_guidance(self, latents: Tensor, timestep: Tensor, condition: Condition) -> None:
        """Once for a kind of call, raise a ValueError if its guidance at a step is another one where the step before was made."""
        plain = (str, int, float, bool, list, tuple, dict, type(None))
        kind = tuple(sorted((name, str(value) if isinstance(value, plain) else type(value).__name__) for name, value in condition.kwargs.items()))
        if kind in self._of_one_step or self._edits:
            return
        # In this order: a gate lets the first call of a kind through, to learn its form.
        after, alone = (self._evaluated(latents, timestep, condition, {}, first=first)[0] for first in (0, 1))
        if self._edits:
            return
        error = float((after.float() - alone.float()).abs().max() / alone.float().abs().max().clamp(min=1e-12))
        if error > (1e-4 if alone.dtype == torch.float32 else 3e-2):
            raise ValueError(
                f"{self.driver.calls.name}'s guidance goes by the steps before (a momentum, say): its output at a step by itself is off by {100 * error:.2g}%, "
                "so that predict(guidance=True) would not be what a roll-out sees. Leave guidance out, or learn on replays of whole trajectories."
            )
        self._of_one_step.add(kind)

    def _together(self, latents: Tensor, timesteps: Tensor, condition: Condition, overrides: dict) -> Tensor:
        if self._edits:
            return self._at_start(latents, timesteps, condition, overrides)
        output, has_others = self._evaluated(latents, timesteps, condition, overrides)
        if self._edits:
            return self._at_start(latents, timesteps, condition, overrides)
        if has_others and self._reads_others is None:
            with torch.no_grad():
                self._reads_others = not torch.equal(output, self._evaluated(latents, timesteps, condition, overrides, others=0.0)[0])
        if has_others and self._reads_others:
            raise ValueError(
                f"{type(self.driver.pipeline).__name__} denoises with several schedulers, each of them a part of the sample (a video and its sound, say), and "
                "its denoiser reads all parts at once: given one part alone, predict would be of another sample. Learn on replays, which have all parts."
            )
        return output

    def _evaluated(self, latents: Tensor, timesteps: Tensor, condition: Condition, overrides: dict, others: float = 1.0, first: int = 1) -> tuple[Tensor, bool]:
        """Solver step 0 is gated, unless it is the `first` one, and returns `latents`; step 1 evaluates them at `timesteps`; the rest is skipped. The
        states of other schedulers stay their initial ones, times `others`; the second value says whether there are any."""
        outputs: list[Tensor] = []
        found: list[int] = []
        portions = {0}

        def capture(step: Step) -> Tensor:
            if step.child:
                found.append(step.child)
            portions.add(step.portion)
            if step.child or step.k > 1:
                return others * step.sample
            given = step.like(latents)
            if step.k == 0 and step.sample.shape != given.shape:
                raise ValueError(
                    f"The pipeline's own latents are {tuple(step.sample.shape)}, those given {tuple(given.shape)}: the condition's height, width or "
                    "number of frames are of another size."
                )
            if step.k == 1:
                self._edits = step.sample.shape != given.shape or not torch.equal(step.sample, given)
                outputs.append(self.driver.scheduler.denoising_output(step.model_output, step.sample))
            return given

        self.driver.drive(condition, capture, timesteps=self._rows(timesteps, condition), needs_denoiser=lambda k: first <= k <= 1, **overrides)
        if not outputs:
            raise ValueError("The pipeline took fewer than two solver steps; raise num_inference_steps (or strength).")
        if len(portions) > 1:
            self.driver.refuse_portions(condition, "learn on replays, which have all of them")
        return outputs[0], bool(found)

    def _at_start(self, latents: Tensor, timesteps: Tensor, condition: Condition, overrides: dict) -> Tensor:
        """The same for a pipeline that edits its latents between steps, as inpainting puts back what it keeps: at solver step 0, where it starts from
        `latents` in the place of those that it has prepared, unedited.

        Raises:
            ValueError: it arrives at step 0 with others.
        """
        outputs: list[Tensor] = []

        def capture(step: Step) -> Tensor:
            if step.child or step.k:
                return step.sample
            given = step.like(latents)
            if step.sample.shape != given.shape or not torch.allclose(step.sample, given, rtol=1e-6, atol=0):
                raise ValueError(
                    f"{type(self.driver.pipeline).__name__} edits its latents between steps, and those that it should start from arrive at the first one as "
                    "others, so that predict has no meaning there."
                )
            outputs.append(self.driver.scheduler.denoising_output(step.model_output, step.sample))
            return step.sample

        def put(prepared: Tensor) -> Tensor:
            return latents.to(prepared) if prepared.shape == latents.shape else prepared

        with prepared_latents(self.driver.pipeline, put):
            self.driver.drive(condition, capture, timesteps=self._rows(timesteps, condition), needs_denoiser=lambda k: k == 0, **overrides)
        return outputs[0]

    def _rows(self, timesteps: Tensor, condition: Condition) -> Tensor:
        """`timesteps` for each solver step of the call."""
        steps = max(2, int(condition.kwargs.get("num_inference_steps") or self._default("num_inference_steps", 50)))
        return timesteps.expand(steps, *timesteps.shape)

    def _one_by_one(self, latents: Tensor, timesteps: Tensor, condition: Condition, overrides: dict) -> Tensor:
        out: list[Tensor | None] = [None] * len(latents)
        values = sorted(set(timesteps.tolist()))
        for index in [[i] for i in range(len(out))] if self.driver.lockstep else [(timesteps == v).nonzero().flatten().tolist() for v in values]:
            part = self._together(latents[index], timesteps[index[0]], condition.select(index), overrides)
            for i, row in zip(index, part):
                out[i] = row
        return torch.stack(out)

    @torch.no_grad()
    def _takes_own_times(self, latents: Tensor, timesteps: Tensor, condition: Condition, overrides: dict) -> bool:
        """Whether each sample is evaluated at its own time: together they are then as one by one, and not as at one time for all."""
        least, most = self.driver.scheduler.time_range
        # Other times than those given, which may be near each other.
        apart = least + (most - least) * torch.linspace(0.25, 0.75, len(timesteps))
        apart = (apart.round() if most > 10 else apart).to(timesteps)  # whole numbers where times are
        one_by_one = self._one_by_one(latents, apart, condition, overrides).float()
        try:
            together = self._together(latents, apart, condition, overrides).float()
        except (RuntimeError, ValueError, TypeError) as error:
            if of_the_device(error):
                raise
            reason = f"its call refuses more ({type(error).__name__}: {str(error).splitlines()[0]})" if str(error) else "its call refuses more"
        else:
            # Relative to what the time changes: kernels round differently for another batch, in each precision by another amount.
            shared = self._together(latents, apart[0], condition, overrides).float()
            if (together - one_by_one).norm() <= 0.1 * (shared - one_by_one).norm():
                return True
            reason = "its batch is evaluated at one of them"
        logger.warning(
            "%s takes one time per batch: %s. Outputs at times of their own (Policy.predict) cost one denoiser call a time, not one per batch.",
            type(self.driver.pipeline).__name__, reason,
        )  # fmt: skip
        return False

    def guidance_off(self, condition: Condition) -> dict[str, Any]:
        """Arguments that switch guidance off; see `Policy.guidance_off`."""
        return self._guidance.off(condition)

    def _default(self, name: str, otherwise):
        parameter = self.driver.parameters.get(name)
        return otherwise if parameter is None or parameter.default in (inspect.Parameter.empty, None) else parameter.default
