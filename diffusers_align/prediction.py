"""The model's output at given latents and times, by the pipeline's own forward pass.

Two things differ between pipelines and are found out by trying, once: which arguments switch classifier-free guidance off, and
whether the loop takes a time for each sample.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from .condition import Condition
from .driver import Step


class Prediction:
    """`Policy.predict`, with what it has learned about the policy's pipeline."""

    def __init__(self, policy):
        self.policy = policy
        self._unguided: dict[tuple, dict[str, Any]] = {}
        self._own_times: bool | None = None

    def __call__(self, latents: Tensor, timesteps: Tensor, condition: Condition, guidance: bool) -> Tensor:
        """(B, *D) at `latents` (B, *D) and `timesteps` (B,); see `Policy.predict`."""
        if len(latents) != len(condition) or timesteps.shape != (len(condition),):
            raise ValueError(f"{len(condition)} prompts need latents and timesteps of as many, got {tuple(latents.shape)} and {tuple(timesteps.shape)}.")
        overrides = {} if guidance else self._guidance_off(condition)
        one_time = len(timesteps if self.policy.lockstep else set(timesteps.tolist())) == 1
        if not guidance and not one_time and self._own_times is None:
            with torch.no_grad():
                # Other times than those given, which may be equal in lockstep.
                apart = (timesteps * torch.linspace(0.5, 1, len(timesteps)).to(timesteps.device)).to(timesteps) if self.policy.lockstep else timesteps
                self._own_times = self._takes_own_times(latents, apart, condition, overrides)
        if one_time:
            return self._together(latents, timesteps[0], condition, overrides)
        if self._own_times and not guidance:
            return self._together(latents, timesteps, condition, overrides)
        return self._one_by_one(latents, timesteps, condition, overrides)

    def _together(self, latents: Tensor, timesteps: Tensor, condition: Condition, overrides: dict) -> Tensor:
        """Solver step 0 is gated and returns `latents`; step 1 evaluates them at `timesteps`; the rest is skipped."""
        rows = max(2, int(condition.kwargs.get("num_inference_steps", self._default("num_inference_steps", 50))))
        outputs: list[Tensor] = []

        def capture(step: Step) -> Tensor:
            if step.k == 1:
                if step.sample.shape != latents.shape or not torch.equal(step.sample, latents):
                    raise ValueError(f"{type(self.policy.pipeline).__name__} edits its latents between steps; predict has no meaning there.")
                outputs.append(step.model_output)
            return latents if step.k == 0 else step.sample

        self.policy._drive(
            condition, capture, timesteps=timesteps.expand(rows, *timesteps.shape), needs_denoiser=lambda k: k == 1, **overrides
        )  # fmt: skip
        if not outputs:
            raise ValueError("The pipeline took fewer than two solver steps; raise num_inference_steps (or strength).")
        return outputs[0]

    def _one_by_one(self, latents: Tensor, timesteps: Tensor, condition: Condition, overrides: dict) -> Tensor:
        out: list[Tensor | None] = [None] * len(latents)
        values = sorted(set(timesteps.tolist()))
        for index in [[i] for i in range(len(out))] if self.policy.lockstep else [(timesteps == v).nonzero().flatten().tolist() for v in values]:
            part = self._together(latents[index], timesteps[index[0]], condition.select(index), overrides)
            for i, row in zip(index, part):
                out[i] = row
        return torch.stack(out)

    def _takes_own_times(self, latents: Tensor, timesteps: Tensor, condition: Condition, overrides: dict) -> bool:
        one_by_one = self._one_by_one(latents, timesteps, condition, overrides)
        try:
            together = self._together(latents, timesteps, condition, overrides)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError):
            return False
        # Kernels round differently for another batch; half precision to 1e-2.
        tolerance = 1e-3 if one_by_one.dtype == torch.float32 else 3e-2
        return bool((together - one_by_one).abs().max() <= tolerance * one_by_one.abs().max())

    def _guidance_off(self, condition: Condition) -> dict[str, Any]:
        """Arguments that switch classifier-free guidance off: found by trying which give one denoiser row a sample."""
        negative = sorted(name for name in condition.per_sample if name.startswith("negative_"))
        key = (*(str(condition.kwargs.get(name)) for name in ("true_cfg_scale", "guidance_scale", "negative_prompt")), *negative)
        if key not in self._unguided:
            single = condition.select([0])
            tries = [{}, *({name: value} for name in ("true_cfg_scale", "guidance_scale") for value in (1.0, 0.0) if name in self.policy._parameters)]
            for overrides in tries:
                if self._rows_a_step(single, overrides) == 1:
                    self._unguided[key] = overrides
                    break
            else:
                raise ValueError(f"Found no argument of {type(self.policy.pipeline).__name__} that switches guidance off; call predict(..., guidance=True).")
        return self._unguided[key]

    @torch.no_grad()
    def _rows_a_step(self, single: Condition, overrides: dict) -> int | None:
        rows, in_first = [], [True]

        def count(module, args, kwargs):
            first = args[0] if args else next(iter(kwargs.values()))
            if in_first[0]:
                rows.append(len(first))

        def step(step: Step) -> Tensor:
            in_first[0] = False
            step.skip()
            return step.sample

        handles = [m.register_forward_pre_hook(count, with_kwargs=True) for m in self.policy.denoisers.values()]
        try:
            self.policy._drive(single, step, needs_denoiser=lambda k: k == 0, **overrides)
        except torch.OutOfMemoryError:
            raise
        except (ValueError, TypeError, AssertionError, RuntimeError):
            return None
        finally:
            for handle in handles:
                handle.remove()
        return sum(rows)

    def _default(self, name: str, otherwise):
        parameter = self.policy._parameters.get(name)
        return otherwise if parameter is None or parameter.default in (inspect.Parameter.empty, None) else parameter.default
