r"""DDIM as a policy: the kernel of https://arxiv.org/abs/2010.02502, equations (12) and (16), with a log-probability.

$$ x_{t-1} \sim \mathcal N\big(\sqrt{\bar\alpha_{t-1}}\, \hat x_0 + \sqrt{1-\bar\alpha_{t-1}-s^2}\, \hat\epsilon,\; s^2 I\big), \qquad
s = \eta \sqrt{\tfrac{1-\bar\alpha_{t-1}}{1-\bar\alpha_t}\big(1-\tfrac{\bar\alpha_t}{\bar\alpha_{t-1}}\big)} $$

Used by DDPO (https://arxiv.org/abs/2305.13301), DPOK and D3PO with eta = 1, which is ancestral (DDPM) sampling.
"""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from ..checks.ranges import Probability, check_value
from ..transition import GaussianTransition
from .scheduling_utils import Generator, SDESchedulerMixin, SDESchedulerOutput, as_state, build_source, check_window, returned


class DDIMSDEScheduler(SDESchedulerMixin, DDIMScheduler):
    """`DDIMScheduler` whose `step` draws from the kernel above and returns its log-probability.

    Args:
        eta: weight of the noise, from 0 (the stock deterministic step, bit for bit) to 1 (ancestral sampling). A config
            attribute, because stock pipelines pass `eta=0.0` to any `step` that takes one.
        sde_window: (first, last + 1): solver steps that are stochastic; the stock deterministic step is taken elsewhere.
        source: config of the stock scheduler whose noise table this one copies, where its own arguments cannot rebuild it
            (CogVideoX's shifted table). Written by `sde_twin`.

    The other arguments are `DDIMScheduler`'s. Models that predict epsilon, v or the sample are supported.

    Raises:
        ValueError: eta outside [0, 1], or a wrong window.
    """

    tuple_length = 2

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
        eta: float = 1.0,
        sde_window: tuple[int, int] | list[int] | None = None,
        source: dict | None = None,
    ):
        # By keyword: the parent would register positional values as its defaults, and copies would lose them.
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,
            trained_betas=trained_betas,
            clip_sample=clip_sample,
            set_alpha_to_one=set_alpha_to_one,
            steps_offset=steps_offset,
            prediction_type=prediction_type,
            thresholding=thresholding,
            dynamic_thresholding_ratio=dynamic_thresholding_ratio,
            clip_sample_range=clip_sample_range,
            sample_max_value=sample_max_value,
            timestep_spacing=timestep_spacing,
            rescale_betas_zero_snr=rescale_betas_zero_snr,
        )
        check_value("eta", eta, Probability)  # above 1 the kernel's direction term is imaginary
        check_window(sde_window)
        if (other := build_source(source)) is not None:
            self.alphas_cumprod = other.alphas_cumprod.to(torch.float32)
            self.final_alpha_cumprod = torch.tensor(1.0) if set_alpha_to_one else self.alphas_cumprod[0]

    def _get_variance(self, timestep: int, prev_timestep: int) -> Tensor:
        """The parent's, kept below 1 - alpha': at zero terminal SNR they are equal, and rounding would make the direction term NaN."""
        variance = super()._get_variance(timestep, prev_timestep)
        room = 1 - (self.alphas_cumprod[prev_timestep] if prev_timestep >= 0 else self.final_alpha_cumprod)
        return torch.where((variance**0.5) ** 2 > room, room * (1 - 1e-6), variance)

    def _eta_at(self, timestep: int) -> float:
        """The weight of the noise in the step that leaves `timestep`. Only a window asks which step of the schedule that is."""
        k = 0 if self.config.sde_window is None else self.step_position(timestep)
        return self.config.eta if self._draws_at(k) else 0.0

    def _previous(self, timestep: int) -> int:
        return timestep - self.config.num_train_timesteps // self.num_inference_steps

    @property
    def stochastic_steps(self) -> Tensor:
        times = self.timesteps.tolist()
        return torch.tensor([self._eta_at(t) > 0 and float(self._get_variance(t, self._previous(t))) > 0 for t in times])

    def step_position(self, timestep) -> int:
        matches = (self.timesteps == int(timestep)).nonzero()
        if len(matches) == 0:
            raise ValueError(f"Timestep {timestep} is not one of the scheduler's {len(self.timesteps)} timesteps; pass one of `scheduler.timesteps`.")
        return int(matches[0])

    def _stock_step(self, model_output: Tensor, timestep, sample: Tensor, eta: float, noise: Tensor | None = None):
        return DDIMScheduler.step(self, model_output, timestep, sample, eta=eta, variance_noise=noise)

    def transition(self, model_output: Tensor, timestep, sample: Tensor) -> GaussianTransition:
        """The DDIM kernel at `timestep`, for the model's output (B, *D) at the state `sample` (B, *D), in float32."""
        return self._kernel(model_output, timestep, sample)[0]

    def _kernel(self, model_output: Tensor, timestep, sample: Tensor) -> tuple[GaussianTransition, Tensor]:
        t, sample = int(timestep), sample.float()
        eta = self._eta_at(t)
        stock = self._stock_step(model_output.float(), t, sample, eta, torch.zeros_like(sample) if eta > 0 else None)
        std = eta * self._get_variance(t, self._previous(t)) ** 0.5
        std = std.to(sample.device, torch.float32).reshape([1] * sample.ndim)
        return GaussianTransition(stock.prev_sample, std), stock.pred_original_sample

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generator = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
        *,
        prev_sample: Tensor | None = None,
    ) -> SDESchedulerOutput | tuple:
        """One reverse step. With `return_dict=False`, the stock tuple (prev_sample, pred_original_sample).

        `eta` is accepted and ignored: stock pipelines always pass their own default, 0.0, which would turn the policy into an
        ODE; the config's `eta` counts. `prev_sample` (B, *D) is scored and returned instead of a fresh draw.
        """
        if use_clipped_model_output:
            raise ValueError("use_clipped_model_output has no kernel here; set clip_sample=False in the scheduler's config instead.")
        t = int(timestep)
        if self._eta_at(t) == 0 or float(self._get_variance(t, self._previous(t))) <= 0:
            stock = self._stock_step(model_output, timestep, sample, eta=0.0)
            output = self._deterministic_output(stock, returned(sample, model_output), prev_sample, stock.pred_original_sample)
        else:
            output = self._stochastic_step(model_output, timestep, sample, generator, variance_noise, prev_sample)
        return output if return_dict else (output.prev_sample, output.pred_original_sample)

    def _stochastic_step(self, model_output, timestep, sample, generator, variance_noise, prev_sample) -> SDESchedulerOutput:
        transition, pred_original_sample = self._kernel(model_output, timestep, sample)
        if prev_sample is None and variance_noise is not None:
            prev_sample = as_state(transition.mean + transition.std * variance_noise, returned(sample, model_output))
        return self._score(transition, returned(sample, model_output), pred_original_sample, generator, prev_sample)
