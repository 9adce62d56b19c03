r"""Stock schedulers whose own step is a Gaussian draw already: the same draw, with its log-probability.

Consistency samplers re-noise a clean estimate, $x_s = \alpha_s \hat x_0(x_t) + \sigma_s \epsilon$; ancestral samplers draw from a posterior whose variance
is a table's or the model's. Given $x_t$, each is $\mathcal N(\mu, \mathrm{std}^2)$, so these samplers are policies as they stand: no SDE is put in the place
of an ODE, and a roll-out is what the stock pipeline samples, bit for bit from the same noise in float32.

What `deterministic` means here. There is no ODE to walk: a consistency model is asked for clean samples of re-noised states, and a walk without the
noise would ask it at states that it never saw. So `deterministic=True` is the stock step, as everywhere: it draws, in a policy as the stock call does
with the same seeds, and hands out no log-probability. Only TCD has a walk without noise of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..transition import GaussianTransition
from .scheduling_utils import Generator, SDESchedulerMixin, SDESchedulerOutput, returned


class Draw(NamedTuple):
    """mean + std * noise, and the clean sample (B, *D) that the model predicts; float32."""

    mean: Tensor
    std: Tensor
    clean: Tensor


class OwnNoiseMixin(SDESchedulerMixin):
    """For a stock scheduler that draws its next state from a Gaussian. A subclass stands before it, and writes `_draw` and `_has_noise`.

    Attributes:
        ends_clean: the last step returns the clean sample itself, and pipelines decode what is returned beside the state.
        jumps: the model's output is no mean of noise or data at its state, but where a trajectory through it leads.
        ends_with_time: the last of the `timesteps` is where the last step ends; pipelines leave it out.
    """

    own_noise = True
    ends_clean = ends_with_time = jumps = False

    def _draw(self, model_output: Tensor, k: int, sample: Tensor, timestep=None) -> Draw:
        """The draw of solver step k in float32; `timestep` is what the pipeline passed, the schedule's own where None."""
        raise TypeError(f"{type(self).__name__} must define _draw(model_output, k, sample, timestep).")

    def _has_noise(self, k: int) -> bool:
        """Whether solver step k draws."""
        raise TypeError(f"{type(self).__name__} must define _has_noise(k).")

    def _stock_step(self, model_output: Tensor, timestep, sample: Tensor, generator: Generator):
        return super().step(model_output, timestep, sample, generator=generator)

    @property
    def num_steps(self) -> int:
        """Solver steps of the current schedule."""
        return len(self.timesteps) - self.ends_with_time

    def stand_in(self, timesteps: Tensor) -> None:
        super().stand_in(torch.cat([timesteps, timesteps[-1:]]) if self.ends_with_time else timesteps)

    @property
    def stochastic_steps(self) -> Tensor:
        return torch.tensor([not self.deterministic and self._has_noise(k) for k in range(self.num_steps)])

    def step_position(self, timestep) -> int:
        found = (self.timesteps[: self.num_steps].cpu() == first_time(timestep)).nonzero()
        if len(found) == 0:
            raise ValueError(f"Timestep {timestep} is not one of the scheduler's {self.num_steps} timesteps; pass one of `scheduler.timesteps`.")
        return int(found[0])

    def skip_step(self, timestep) -> None:
        if hasattr(self, "_init_step_index"):
            self._position(timestep)
            self._step_index += 1

    def _position(self, timestep) -> int:
        """Solver step k of the running schedule, as the stock scheduler counts where it does."""
        if not hasattr(self, "_init_step_index"):
            return self.step_position(timestep)
        if self.step_index is None:
            self._init_step_index(timestep)
        return self.step_index

    def transition(self, model_output: Tensor, timestep, sample: Tensor) -> GaussianTransition:
        """The draw that leaves `timestep`, for the model's output at the state `sample` (B, *D), in float32."""
        k = self.step_position(timestep)
        mean, std, _ = self._draw(model_output.float(), k, sample.float(), timestep)
        return GaussianTransition(mean, std if self._has_noise(k) and not self.deterministic else torch.zeros_like(std))

    def step(
        self,
        model_output: Tensor,
        timestep,
        sample: Tensor,
        generator: Generator = None,
        return_dict: bool = True,
        *,
        prev_sample: Tensor | None = None,
    ) -> SDESchedulerOutput | tuple:
        """One step of the stock sampler. With `return_dict=False`, the stock tuple.

        `prev_sample` (B, *D) is scored and returned instead of a fresh draw.
        """
        output = self._step(model_output, timestep, sample, generator, prev_sample)
        return output if return_dict else (output.prev_sample, output.pred_original_sample)[: self.tuple_length]

    def _step(self, model_output: Tensor, timestep, sample: Tensor, generator: Generator, prev_sample: Tensor | None) -> SDESchedulerOutput:
        k = self._position(timestep)
        noisy, generator = self._has_noise(k), self.generator if generator is None else generator
        mean, std, clean = self._draw(model_output.float(), k, sample.float(), timestep)
        if noisy and not self.deterministic:
            self.skip_step(timestep)
            return self._score(GaussianTransition(mean, std), returned(sample, model_output), clean, generator, prev_sample)
        stock = self._stock_step(model_output, timestep, sample, generator)
        output = self._deterministic_output(stock, returned(sample, model_output), prev_sample, clean)
        if self.ends_clean and not noisy:
            output.pred_original_sample = output.prev_sample
        return output


def first_time(timestep) -> float:
    """The time of a step; pipelines pass a number, a tensor, or one of each sample."""
    return timestep.flatten()[0].item() if isinstance(timestep, Tensor) else timestep


def of_each(level: Tensor | float, sample: Tensor) -> Tensor | float:
    """A level as it multiplies `sample`: a number stays one, and one of each sample (B,) becomes (B, 1, ..., 1), float32 or as precise as the sample."""
    if not isinstance(level, Tensor) or level.ndim == 0:
        return level
    return level.to(sample.device, torch.promote_types(sample.dtype, torch.float32)).reshape(-1, *[1] * (sample.ndim - 1))


def row_of(table: Tensor, timestep: Tensor | float, sample: Tensor) -> Tensor:
    """The row of a table of levels, a number, or that of each sample, (B, 1, ..., 1) to multiply `sample`."""
    return of_each(table[timestep.to(table.device).long() if isinstance(timestep, Tensor) else int(timestep)], sample)


def as_std(std: Tensor, sample: Tensor) -> Tensor:
    """A number (0-dim tensor) as a standard deviation (1, ..., 1) of `sample`."""
    return std.to(sample.device, torch.float32).reshape([1] * sample.ndim)
