r"""Ancestral samplers with a Gaussian of their own as policies: variances that the model learns, and continuous time.

$$ x_{t'} \sim \mathcal N\big(\tilde\mu(x_t, \hat x_0),\; \Sigma_\theta(x_t, t)\big), \qquad
\log \Sigma_\theta = \tfrac{v + 1}{2} \log \beta + \tfrac{1 - v}{2} \log \tilde\beta $$

with the posterior mean of https://arxiv.org/abs/2006.11239, equation 7. Where the model answers with twice the channels, the second half is v, the
interpolated log-variance of each element (improved DDPM, https://arxiv.org/abs/2102.09672, equation 15), and the log-probability has gradients through
both halves. DeepFloyd IF is sampled so, and UnCLIP.
"""

from __future__ import annotations

import torch
from diffusers import DDPMScheduler, DDPMWuerstchenScheduler, UnCLIPScheduler
from torch import Tensor

from .own_noise import Draw, OwnNoiseMixin, as_std, first_time, row_of
from .scheduling_utils import Generator, SDESchedulerOutput

LEARNED = ("learned", "learned_range")


class _Posterior(OwnNoiseMixin):
    """The posterior of a table `alphas_cumprod`, between any two of its rows."""

    tuple_length = 2

    def denoising_output(self, model_output: Tensor, sample: Tensor) -> Tensor:
        """The part of the model's output that is about the clean sample: without the learned variance."""
        return self._halves(model_output, sample)[0]

    def _halves(self, model_output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor | None]:
        """The model's output and its learned variance, None where there is none."""
        if self.variance_type not in LEARNED:
            return model_output, None
        if model_output.shape[1] != 2 * sample.shape[1]:
            raise ValueError(
                f"With variance_type={self.variance_type!r} the model answers with twice the channels of the state, {2 * sample.shape[1]}, got "
                f"{model_output.shape[1]}. If the pipeline leaves the variance out, give it a scheduler with variance_type='fixed_small'."
            )
        return model_output.split(sample.shape[1], dim=1)

    def clean_sample(self, model_output: Tensor, timestep, sample: Tensor) -> Tensor:
        """The clean sample (B, *D) that the model's output implies at `timestep`, clipped or thresholded as the stock scheduler does."""
        output, alpha, config = self._halves(model_output, sample)[0], row_of(self.alphas_cumprod, timestep, sample), self.config
        if config.prediction_type == "epsilon":
            clean = (sample - (1 - alpha) ** 0.5 * output) / alpha**0.5
        else:
            clean = output if config.prediction_type == "sample" else alpha**0.5 * sample - (1 - alpha) ** 0.5 * output
        if config.get("thresholding"):
            return self._threshold_sample(clean)
        return clean.clamp(-config.clip_sample_range, config.clip_sample_range) if config.clip_sample else clean

    def _posterior(self, model_output: Tensor, time: int, previous: int, sample: Tensor) -> Draw:
        clean, variance = self.clean_sample(model_output, time, sample), self._halves(model_output, sample)[1]
        alpha, before = self.alphas_cumprod[time], self.alphas_cumprod[previous] if previous >= 0 else self.one
        ratio, beta = self._ratio(time, previous, alpha, before)
        mean = before**0.5 * beta / (1 - alpha) * clean + ratio**0.5 * (1 - before) / (1 - alpha) * sample
        std = self._std(time, previous, variance) if time > 0 else torch.zeros(())
        return Draw(mean, as_std(std, sample) if std.ndim == 0 else std, clean)

    def _ratio(self, time: int, previous: int, alpha: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """The step's own alpha and beta."""
        ratio = alpha / before
        return ratio, 1 - ratio

    def _has_noise(self, k: int) -> bool:
        return int(self.timesteps[k]) > 0


class DDPMSDEScheduler(_Posterior, DDPMScheduler):
    """`DDPMScheduler` with the log-probability of its own noise, for models that learn their variance (DeepFloyd IF). Arguments are the stock scheduler's.

    Twins of other `DDPMScheduler`s are `DDIMSDEScheduler`s, whose eta can be set.

    Raises:
        ValueError: at a step, a model output without a learned variance where the config says that there is one.
    """

    def _draw(self, model_output: Tensor, k: int, sample: Tensor, timestep=None) -> Draw:
        time = int(self.timesteps[k])
        return self._posterior(model_output, time, int(self.previous_timestep(time)), sample)

    def _std(self, time: int, previous: int, variance: Tensor | None) -> Tensor:
        value = self._get_variance(time, predicted_variance=variance)
        if self.variance_type == "learned_range":
            return torch.exp(0.5 * value)
        return value if self.variance_type == "fixed_small_log" else value**0.5


class UnCLIPSDEScheduler(_Posterior, UnCLIPScheduler):
    """`UnCLIPScheduler` with the log-probability of its own noise, fixed or learned. Its arguments are the stock scheduler's."""

    def _draw(self, model_output: Tensor, k: int, sample: Tensor, timestep=None) -> Draw:
        time = int(self.timesteps[k])
        return self._posterior(model_output, time, self._previous(k), sample)

    def _previous(self, k: int) -> int:
        """Where step k ends: at the next timestep of the schedule, as its pipelines say too."""
        return int(self.timesteps[k + 1]) if k + 1 < len(self.timesteps) else int(self.timesteps[k]) - 1

    def _ratio(self, time: int, previous: int, alpha: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        if previous == time - 1:
            return self.alphas[time], self.betas[time]
        beta = 1 - alpha / before
        return 1 - beta, beta

    def _std(self, time: int, previous: int, variance: Tensor | None) -> Tensor:
        value = self._get_variance(time, prev_timestep=previous, predicted_variance=variance)
        return torch.exp(0.5 * value) if self.variance_type == "learned_range" else value

    def _stock_step(self, model_output: Tensor, timestep, sample: Tensor, generator: Generator):
        previous = self._previous(self.step_position(timestep))
        return UnCLIPScheduler.step(self, model_output, timestep, sample, prev_timestep=previous, generator=generator)

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        prev_timestep: int | None = None,
        generator: Generator = None,
        return_dict: bool = True,
        *,
        prev_sample: Tensor | None = None,
    ) -> SDESchedulerOutput | tuple:
        """One step, to the next timestep of the schedule. `prev_sample` (B, *D) is scored and returned instead of a fresh draw.

        Raises:
            ValueError: a `prev_timestep` that is not the schedule's next one.
        """
        if prev_timestep is not None and int(prev_timestep) != (expected := self._previous(self.step_position(timestep))):
            raise ValueError(f"The step from {int(timestep)} ends at {expected}, the schedule's next timestep, got prev_timestep={int(prev_timestep)}.")
        return super().step(model_output, timestep, sample, generator, return_dict, prev_sample=prev_sample)


class WuerstchenSDEScheduler(OwnNoiseMixin, DDPMWuerstchenScheduler):
    """`DDPMWuerstchenScheduler` (https://arxiv.org/abs/2306.00637; Stable Cascade) with the log-probability of its own noise.

    Its time is continuous, from 1 to 0, with a cosine for a table. Its arguments are the stock scheduler's.
    """

    ends_with_time, tuple_length, time_range = True, 1, (0.0, 1.0)

    def alpha_cumprod(self, timestep: Tensor, sample: Tensor) -> Tensor:
        """alpha^2 at times (B,) or a number, (B or 1, 1, ..., 1) to multiply `sample` with."""
        times = torch.as_tensor(timestep, device=sample.device).reshape(-1)
        return self._alpha_cumprod(times, sample.device).view(-1, *[1] * (sample.ndim - 1))

    def noise_weight(self, timestep: Tensor, sigma: Tensor | None = None) -> Tensor:
        """The weight of the noise in a state, from 0 to 1."""
        return (1 - self._alpha_cumprod(timestep.reshape(-1), timestep.device)).sqrt()

    def step_position(self, timestep) -> int:
        """The nearest, as in the stock scheduler: pipelines round times to the model's dtype."""
        return int((self.timesteps.cpu() - first_time(timestep)).abs().argmin())

    def clean_sample(self, model_output: Tensor, timestep, sample: Tensor) -> Tensor:
        """The clean sample (B, *D) that the predicted noise implies at `timestep`."""
        alpha = self.alpha_cumprod(timestep, sample)
        return (sample - (1 - alpha).sqrt() * model_output) / alpha.sqrt()

    def _draw(self, model_output: Tensor, k: int, sample: Tensor, timestep=None) -> Draw:
        time = self.timesteps[k] if timestep is None else torch.as_tensor(timestep).reshape(-1)[:1]  # as rounded by the pipeline; one for all
        level, before = self.alpha_cumprod(time, sample), self.alpha_cumprod(self.timesteps[k + 1], sample)
        alpha = level / before
        mean = (1.0 / alpha).sqrt() * (sample - (1 - alpha) * model_output / (1 - level).sqrt())
        std = ((1 - alpha) * (1.0 - before) / (1.0 - level)).sqrt()
        return Draw(mean, std, self.clean_sample(model_output, time, sample))

    def _has_noise(self, k: int) -> bool:
        return float(self.timesteps[k + 1]) != 0
