r"""Consistency samplers as policies: each step jumps to a clean estimate and noises it again, which is a Gaussian draw.

$$ x_s \sim \mathcal N\big(\alpha_s \hat x_0(x_t, t),\; \sigma_s^2 I\big), \qquad \hat x_0 = c_{skip}\, x_t + c_{out}\, f_\theta(x_t, t). $$

Algorithm 1 of https://arxiv.org/abs/2303.01469 (consistency models), section 4.3 of https://arxiv.org/abs/2310.04378 (LCM), https://arxiv.org/abs/2410.11081
(sCM, trigonometric flow; SANA-Sprint, https://arxiv.org/abs/2503.09641), and with a part of the noise only https://arxiv.org/abs/2402.19159 (TCD). The
timesteps, the boundary conditions and the noise are the stock schedulers'; the last step draws nothing, as theirs.
"""

from __future__ import annotations

import math

import torch
from diffusers import CMStochasticIterativeScheduler, FlowMatchLCMScheduler, LCMScheduler, SCMScheduler, TCDScheduler
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from ..checks.ranges import Probability, check_value
from .own_noise import Draw, OwnNoiseMixin, as_std, of_each, row_of
from .scheduling_utils import Generator, SDESchedulerOutput


class _OnTable(OwnNoiseMixin):
    """A consistency sampler on a table `alphas_cumprod`."""

    jumps, tuple_length = True, 2

    def _implied(self, model_output: Tensor, timestep, sample: Tensor) -> tuple[Tensor, Tensor]:
        """The clean sample and the noise that the model's output implies, in the stock schedulers' order of operations."""
        alpha = row_of(self.alphas_cumprod, timestep, sample)
        signal, noise, kind = alpha.sqrt(), (1 - alpha).sqrt(), self.config.prediction_type
        if kind == "epsilon":
            return (sample - noise * model_output) / signal, model_output
        if kind == "sample":
            return model_output, (sample - signal * model_output) / noise
        if kind == "v_prediction":
            return signal * sample - noise * model_output, signal * model_output + noise * sample
        raise ValueError(f"prediction_type is epsilon, sample or v_prediction, got {kind!r}.")


class LCMSDEScheduler(_OnTable, LCMScheduler):
    """`LCMScheduler` with the log-probability of its own noise. Its arguments are the stock scheduler's."""

    ends_clean = True

    def clean_sample(self, model_output: Tensor, timestep, sample: Tensor) -> Tensor:
        """The clean sample (B, *D) that the consistency function says at `timestep`, boundary conditions included."""
        clean, config = self._implied(model_output, timestep, sample)[0], self.config
        if config.thresholding:
            clean = self._threshold_sample(clean)
        elif config.clip_sample:
            clean = clean.clamp(-config.clip_sample_range, config.clip_sample_range)
        c_skip, c_out = (of_each(c, sample) for c in self.get_scalings_for_boundary_condition_discrete(timestep))
        return c_out * clean + c_skip * sample

    def _draw(self, model_output: Tensor, k: int, sample: Tensor, timestep=None) -> Draw:
        clean = self.clean_sample(model_output, self.timesteps[k], sample)
        if not self._has_noise(k):
            return Draw(clean, as_std(torch.zeros(()), sample), clean)
        alpha = self._next_level(k)
        return Draw(alpha.sqrt() * clean, as_std((1 - alpha).sqrt(), sample), clean)

    def _next_level(self, k: int) -> Tensor:
        """alpha^2 of the state that step k leads to; where the schedule ends, the step's own, as in the stock scheduler."""
        return self.alphas_cumprod[self.timesteps[min(k + 1, len(self.timesteps) - 1)]]

    def _has_noise(self, k: int) -> bool:
        return k != self.num_inference_steps - 1 and float(self._next_level(k)) < 1


class TCDSDEScheduler(_OnTable, TCDScheduler):
    """`TCDScheduler` with the log-probability of its own noise: it walks on to a time below the next one, and noises up from there.

    Args:
        eta: the paper's gamma, from 0 (deterministic) to 1 (as LCM). A config attribute, because stock pipelines pass `eta=0.0` to any `step` that
            takes one; 0.3 is the stock scheduler's own default.

    The other arguments are the stock scheduler's. `deterministic` is gamma = 0, a walk without noise that the model was trained for.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: list[float] | None = None,
        original_inference_steps: int = 50,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        timestep_scaling: float = 10.0,
        rescale_betas_zero_snr: bool = False,
        eta: float = 0.3,
    ):
        # By keyword: the parent would register positional values as its defaults, and copies would lose them.
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,
            trained_betas=trained_betas,
            original_inference_steps=original_inference_steps,
            clip_sample=clip_sample,
            clip_sample_range=clip_sample_range,
            set_alpha_to_one=set_alpha_to_one,
            steps_offset=steps_offset,
            prediction_type=prediction_type,
            thresholding=thresholding,
            dynamic_thresholding_ratio=dynamic_thresholding_ratio,
            sample_max_value=sample_max_value,
            timestep_spacing=timestep_spacing,
            timestep_scaling=timestep_scaling,
            rescale_betas_zero_snr=rescale_betas_zero_snr,
        )
        check_value("eta", eta, Probability)

    def clean_sample(self, model_output: Tensor, timestep, sample: Tensor) -> Tensor:
        """The clean sample (B, *D) that the model's output implies at `timestep`."""
        return self._implied(model_output, timestep, sample)[0]

    def _levels(self, k: int) -> tuple[Tensor, Tensor]:
        """alpha^2 where the noise-free part of step k ends, and of the next state."""
        following = self.timesteps[k + 1].cpu() if k + 1 < len(self.timesteps) else torch.tensor(0)
        eta = 0.0 if self.deterministic else self.config.eta
        return self.alphas_cumprod[torch.floor((1 - eta) * following).long()], self.alphas_cumprod[following]

    def _draw(self, model_output: Tensor, k: int, sample: Tensor, timestep=None) -> Draw:
        (clean, noise), (below, following) = self._implied(model_output, self.timesteps[k], sample), self._levels(k)
        walked, ratio = below.sqrt() * clean + (1 - below).sqrt() * noise, following / below
        return Draw(ratio.sqrt() * walked, as_std((1 - ratio).sqrt(), sample), clean)

    def _has_noise(self, k: int) -> bool:
        below, following = self._levels(k)
        return k != self.num_inference_steps - 1 and float(following) < float(below)

    def _stock_step(self, model_output: Tensor, timestep, sample: Tensor, generator: Generator):
        eta = 0.0 if self.deterministic else self.config.eta
        return TCDScheduler.step(self, model_output, timestep, sample, eta=eta, generator=generator)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.3,
        generator: Generator = None,
        return_dict: bool = True,
        *,
        prev_sample: Tensor | None = None,
    ) -> SDESchedulerOutput | tuple:
        """One step. With `return_dict=False`, (prev_sample, pred_original_sample).

        `eta` is accepted and ignored: stock pipelines always pass their own default, 0.0; the config's counts. `prev_sample` (B, *D) is scored and
        returned instead of a fresh draw.
        """
        return super().step(model_output, timestep, sample, generator, return_dict, prev_sample=prev_sample)


class FlowMatchLCMSDEScheduler(OwnNoiseMixin, FlowMatchLCMScheduler):
    """`FlowMatchLCMScheduler` with the log-probability of its own noise. Its arguments are the stock scheduler's.

    Raises:
        ValueError: `scale_factors`, at a step: states that grow from step to step have no one trajectory.
    """

    jumps = ends_clean = True
    tuple_length, init_noise_sigma = 1, 1.0

    def clean_sample(self, model_output: Tensor, timestep, sample: Tensor) -> Tensor:
        """The clean sample (B, *D) that the velocity implies at `timestep`, a thousandth of whose units is the noise level."""
        return sample - of_each(timestep, sample) / self.config.num_train_timesteps * model_output

    def _draw(self, model_output: Tensor, k: int, sample: Tensor, timestep=None) -> Draw:
        if self._scale_factors:
            raise ValueError("scale_factors let the states grow from step to step, of which no trajectory can be made: leave them out (set_scale_factors).")
        sigma, following = self.sigmas[k], self.sigmas[k + 1]
        clean = sample - sigma * model_output
        return Draw((1 - following) * clean, as_std(following, sample), clean)

    def _has_noise(self, k: int) -> bool:
        return float(self.sigmas[k + 1]) > 0


class SCMSDEScheduler(OwnNoiseMixin, SCMScheduler):
    r"""`SCMScheduler` with the log-probability of its own noise: $x_t = \cos t\, x_0 + \sin t\, \sigma_d \epsilon$, t from $\pi/2$ to 0.

    Its arguments are the stock scheduler's.
    """

    jumps = ends_clean = ends_with_time = True
    tuple_length = 2

    @property
    def time_range(self) -> tuple[float, float]:
        return 0.0, math.pi / 2 + 1e-5  # the stock schedule begins at 1.5708

    def noise_weight(self, timestep: Tensor, sigma: Tensor | None = None) -> Tensor:
        """The weight of the noise in a state, in units of sigma_data, from 0 to 1."""
        return torch.sin(timestep)

    def clean_sample(self, model_output: Tensor, timestep, sample: Tensor) -> Tensor:
        """The clean sample (B, *D) that the trigonometric velocity implies at `timestep`."""
        time = torch.as_tensor(timestep).to(sample.device).reshape(-1, *[1] * (sample.ndim - 1))
        return torch.cos(time) * sample - torch.sin(time) * model_output

    def _draw(self, model_output: Tensor, k: int, sample: Tensor, timestep=None) -> Draw:
        time, following = self.timesteps[k], self.timesteps[k + 1]
        clean = self.clean_sample(model_output, time, sample)
        return Draw(torch.cos(following) * clean, as_std(torch.sin(following) * self.config.sigma_data, sample), clean)

    def _has_noise(self, k: int) -> bool:
        return float(torch.sin(self.timesteps[k + 1])) > 0


class CMSDEScheduler(OwnNoiseMixin, CMStochasticIterativeScheduler):
    """`CMStochasticIterativeScheduler` with the log-probability of its own noise. Its arguments are the stock scheduler's."""

    jumps = ends_clean = True
    tuple_length = 1

    @property
    def time_range(self) -> tuple[float, float]:
        least, most = self.sigma_to_t([self.config.sigma_min, self.config.sigma_max]).tolist()
        return least, most

    def clean_sample(self, model_output: Tensor, timestep, sample: Tensor) -> Tensor:
        """The clean sample (B, *D) that the consistency function says at `timestep`, boundary conditions included."""
        return self._clean(model_output, of_each(self._sigma(timestep), sample), sample)

    def noise_weight(self, timestep: Tensor, sigma: Tensor | None = None) -> Tensor:
        """The weight of the noise in a state that is scaled to unit variance, from 0 to 1."""
        level = self._sigma(timestep)
        return level / (1 + level**2) ** 0.5

    def _sigma(self, timestep) -> Tensor:
        """`sigma_to_t`, inverted."""
        return torch.as_tensor(timestep).double().div(250).exp().float()

    def _clean(self, model_output: Tensor, sigma: Tensor, sample: Tensor) -> Tensor:
        c_skip, c_out = self.get_scalings_for_boundary_condition(sigma)
        clean = c_out * model_output + c_skip * sample
        return clean.clamp(-1, 1) if self.config.clip_denoised else clean

    def _noise_level(self, k: int) -> Tensor:
        low, high = self.config.sigma_min, self.config.sigma_max
        level = self.sigmas[k + 1 if k + 1 < self.config.num_train_timesteps else -1].clamp(min=low, max=high)
        return (level**2 - low**2) ** 0.5 * self.config.s_noise

    def _draw(self, model_output: Tensor, k: int, sample: Tensor, timestep=None) -> Draw:
        clean = self._clean(model_output, self.sigmas[k], sample)
        return Draw(clean, as_std(self._noise_level(k), sample), clean)

    def _has_noise(self, k: int) -> bool:
        return len(self.timesteps) > 1 and float(self._noise_level(k)) > 1e-2 * self.config.sigma_min  # what is below is rounding
