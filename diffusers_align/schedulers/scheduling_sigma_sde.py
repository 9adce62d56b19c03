"""Euler in sigma space as a policy: ancestral steps along any stock scheduler's own noise levels, with a log-probability."""

from __future__ import annotations

import inspect

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from ..checks.ranges import Probability, check_value
from ..transition import GaussianTransition
from .scheduling_utils import Generator, SDESchedulerMixin, SDESchedulerOutput, build_source, check_window, returned
from .sigma_space import SigmaSpace, ancestral_step, columns

# The schedulers whose own step is Euler's: it is taken where there is no noise. The others' is of another order; Euler's takes its place.
_EULER = ("EulerDiscreteScheduler", "EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler")


class SigmaSDEScheduler(SDESchedulerMixin, EulerDiscreteScheduler):
    """Ancestral sampling along a table of sigmas: `step` draws from the kernel of `ancestral_step` and returns its log-probability.

    It asks the denoiser as the scheduler that it stands for: at that one's timesteps, continuous ones too, with its input scale, from its initial
    noise, and its output means what it means there. States have that one's scale as well: they explode with sigma (Euler, EDM) or keep their
    variance (DPM-Solver, UniPC).

    Args:
        eta: weight of the noise, from 0 (Euler's step; bit for bit the stock one of EulerDiscrete, EDMEuler and FlowMatchEuler) to 1 (the exact posterior
            of the variance-exploding process).
        sde_window: (first, last + 1): solver steps that are stochastic; those elsewhere are as with eta = 0.
        source: config of the stock scheduler that it stands for. Written by `sde_twin`; without, `EulerDiscreteScheduler` with the other arguments.

    The other arguments are `EulerDiscreteScheduler`'s. Solvers that evaluate the model twice a step (Heun, KDPM2, DPM-Solver SDE) are walked along their
    whole steps only. Sources: Karras et al., https://arxiv.org/abs/2206.00364 (schedules, preconditioning); `sigma_space` for the kernel.

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
        prediction_type: str = "epsilon",
        interpolation_type: str = "linear",
        use_karras_sigmas: bool | None = False,
        use_exponential_sigmas: bool | None = False,
        use_beta_sigmas: bool | None = False,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        timestep_spacing: str = "linspace",
        timestep_type: str = "discrete",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        final_sigmas_type: str = "zero",
        eta: float = 1.0,
        sde_window: tuple[int, int] | list[int] | None = None,
        source: dict | None = None,
    ):
        check_value("eta", eta, Probability)
        check_window(sde_window)
        own = {name: value for name, value in self.config.items() if name not in ("eta", "sde_window", "source") and not name.startswith("_")}
        self._source = build_source(source) or EulerDiscreteScheduler.from_config(own)
        reads = inspect.signature(type(self._source).__init__).parameters  # a config also holds what other classes read
        clips = "clip_sample" in reads and self._source.config.clip_sample
        self._largest = float(self._source.config.clip_sample_range) if clips else None
        if getattr(self._source, "order", 1) > 1:  # its table repeats sigmas or has some between the steps
            known = self._source.config.beta_schedule in ("linear", "scaled_linear", "squaredcos_cap_v2")
            betas = {} if known else {"beta_schedule": "linear", "trained_betas": self._source.betas.tolist()}  # Euler knows no other by name
            self._source = EulerDiscreteScheduler.from_config(self._source.config, **betas)
        self.space = SigmaSpace(self._source)
        self._walks_euler = type(self._source).__name__ in _EULER and not clips
        self.num_inference_steps, self.is_scale_input_called = None, False
        # What pipelines read of that one's config beside Euler's entries: EDM's sigma_data ...
        self.register_to_config(**{name: value for name, value in self._source.config.items() if name not in self.config})
        self._follow()

    @classmethod
    def _get_compatibles(cls):
        """Of each kind that it stands for one, whose entries its config holds too."""
        kinds = (HeunDiscreteScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler, EDMDPMSolverMultistepScheduler)
        return [*super()._get_compatibles(), *kinds, FlowMatchEulerDiscreteScheduler]

    def __getattr__(self, name: str):
        """What else pipelines ask of the scheduler that this one stands for: `precondition_outputs`, `alphas_cumprod` ..."""
        source = self.__dict__.get("_source")
        if source is not None and not name.startswith("__") and hasattr(source, name):
            return getattr(source, name)
        return super().__getattr__(name)

    def _follow(self) -> None:
        self.timesteps, self.sigmas = self._source.timesteps, self._source.sigmas
        self._step_index = self._begin_index = None
        self._stands_in = False

    def _synchronised(self):
        """The source at this scheduler's position."""
        source = self._source
        source.timesteps, source.sigmas, source._step_index, source._begin_index = self.timesteps, self.sigmas, self._step_index, self._begin_index
        source.is_scale_input_called = True
        return source

    # --- what pipelines ask of the schedule -----------------------------------------------------------------------------

    @property
    def init_noise_sigma(self) -> float | Tensor:
        return getattr(self._source, "init_noise_sigma", 1.0)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[float] | None = None,
        sigmas: list[float] | None = None,
    ) -> None:
        """The source's schedule.

        Raises:
            ValueError: timesteps or sigmas where the source takes none.
        """
        given = {name: value for name, value in (("timesteps", timesteps), ("sigmas", sigmas)) if value is not None}
        if unknown := sorted(set(given) - set(inspect.signature(self._source.set_timesteps).parameters)):
            raise ValueError(f"{type(self._source).__name__} takes no {unknown[0]} of one's own: give num_inference_steps.")
        self._source.set_timesteps(num_inference_steps, device=device, **given)
        self.num_inference_steps = len(self._source.timesteps)
        self._follow()

    def stand_in(self, timesteps: Tensor) -> None:
        """Ask the denoiser at other times: rows (N,) or (N, B), of which each has its own noise level. For single evaluations, not for steps."""
        timesteps = timesteps.to(self.timesteps)
        among = timesteps[..., None] == self.timesteps
        # Of a time of the schedule the level as it is there, bit for bit; unless several have that time, as below the noise of the training.
        sigmas = torch.where((among.sum(-1) == 1).to(self.sigmas.device), self.sigmas[among.int().argmax(-1)], self.space.sigma_of(timesteps).to(self.sigmas))
        self.timesteps, self.sigmas = timesteps, torch.cat([sigmas, torch.zeros_like(sigmas[:1])])
        self._step_index, self._begin_index, self._stands_in = None, 0, True

    def index_for_timestep(self, timestep, schedule_timesteps: Tensor | None = None) -> int:
        return self._source.index_for_timestep(timestep, self.timesteps if schedule_timesteps is None else schedule_timesteps)

    def scale_model_input(self, sample: Tensor, timestep) -> Tensor:
        if self.step_index is None:
            self._init_step_index(timestep)
        if not self.space.scaled:
            return sample
        source = self._synchronised()
        if self.sigmas.ndim > 1:
            source.sigmas, source._step_index = columns(self.sigmas[self.step_index], sample.float())[None], 0
        return source.scale_model_input(sample, timestep).to(sample.dtype)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if hasattr(self._source, "add_noise"):
            return self._synchronised().add_noise(original_samples, noise, timesteps)
        sigma = self.space.sigma_of(timesteps)
        return original_samples + columns(sigma, original_samples) * noise

    # --- the policy -----------------------------------------------------------------------------------------------------

    @property
    def time_range(self) -> tuple[float, float]:
        return self.space.time_range

    def noise_weight(self, timestep: Tensor, sigma: Tensor | None = None) -> Tensor:
        """The weight of the noise in a state that is scaled to unit variance, from 0 to 1."""
        sigma = self.space.sigma_of(timestep) if sigma is None else sigma.double()
        return sigma * (1 + sigma.square()).rsqrt()

    def kernel(self, k: int) -> tuple[float, float, float]:
        """Weights of the state and of the clean sample in the mean of solver step k, and its standard deviation; 0 where there is no noise."""
        sigma, sigma_next = self.sigmas[k : k + 2].tolist()
        kept, added = ancestral_step(sigma, sigma_next, self.config.eta if self._draws_at(k) else 0.0)
        before, after = self.space.alpha(torch.tensor([sigma, sigma_next], dtype=torch.float64)).tolist()
        return after * kept / (before * sigma), after * (1 - kept / sigma), after * added

    @property
    def stochastic_steps(self) -> Tensor:
        return torch.tensor([self.kernel(k)[2] > 0 for k in range(len(self.timesteps))])

    def step_position(self, timestep) -> int:
        timestep = timestep.to(self.timesteps.device) if isinstance(timestep, Tensor) else timestep
        matches = (self.timesteps == timestep).nonzero().flatten().tolist()
        if not matches:
            raise ValueError(f"Timestep {timestep} is not one of the scheduler's {len(self.timesteps)} timesteps; pass one of `scheduler.timesteps`.")
        # Noise levels below those of the training have the same timestep.
        return self.step_index if self.step_index in matches else matches[0]

    def skip_step(self, timestep) -> None:
        if self.step_index is None:
            self._init_step_index(timestep)
        self._step_index += 1

    def clean_sample(self, k: int, model_output: Tensor, sample: Tensor) -> Tensor:
        """The clean sample (B, *D) that the model's output at step k implies, float32; clipped where the source clips it."""
        return self.clean_at(self.sigmas[k], model_output, sample)

    def clean_at(self, sigma: Tensor, model_output: Tensor, sample: Tensor) -> Tensor:
        """The same at a noise level, one for all samples or (B,)."""
        state, output = (columns(weight, sample.float()) for weight in self.space.clean_weights(sigma.double().cpu()))
        clean = state * sample.float() + output * model_output.float()
        return clean if self._largest is None else clean.clamp(-self._largest, self._largest)

    def ask(self, model_output: Tensor, timestep, sample: Tensor, return_dict: bool = True, **unused) -> SDESchedulerOutput | tuple:
        """A step for the sake of its clean sample, which the pipeline takes back: it draws nothing, and the state stays."""
        if self.step_index is None:
            self._init_step_index(timestep)
        k = self.step_index
        if self._walks_euler and not self._stands_in:
            clean = self._synchronised().step(model_output, timestep, sample).pred_original_sample
        else:
            clean = self.clean_sample(k, model_output, sample)
        self._step_index = k + 1
        return SDESchedulerOutput(sample, clean) if return_dict else (sample, clean)

    def transition(self, model_output: Tensor, timestep, sample: Tensor) -> GaussianTransition:
        """The kernel of the step that leaves `timestep`, for the model's output (B, *D) at the state `sample` (B, *D), in float32."""
        k = self.step_position(timestep)
        return self._transition(k, self.clean_sample(k, model_output, sample), sample)

    def _transition(self, k: int, clean: Tensor, sample: Tensor) -> GaussianTransition:
        x_weight, clean_weight, std = self.kernel(k)
        mean = x_weight * sample.float() + clean_weight * clean.float()
        return GaussianTransition(mean, torch.full([1] * sample.ndim, std, device=sample.device))

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Generator = None,
        return_dict: bool = True,
        pred_original_sample: Tensor | None = None,
        *,
        prev_sample: Tensor | None = None,
    ) -> SDESchedulerOutput | tuple:
        """One reverse step. With `return_dict=False`, the stock tuple (prev_sample, pred_original_sample).

        `prev_sample` (B, *D) is scored and returned instead of a fresh draw. `pred_original_sample` stands for the clean sample that the model's output
        implies, as in `EDMEulerScheduler`. The `s_` arguments are the parent's and unused.
        """
        if self.step_index is None:
            self._init_step_index(timestep)
        k, back = self.step_index, returned(sample, model_output)
        given = {} if pred_original_sample is None else {"pred_original_sample": pred_original_sample}
        if self.kernel(k)[2] == 0 and self._walks_euler:
            stock = self._synchronised().step(model_output, timestep, sample, **given)
            clean = getattr(stock, "pred_original_sample", None)
            output = self._deterministic_output(stock, back, prev_sample, self.clean_sample(k, model_output, sample) if clean is None else clean)
        else:
            clean = self.clean_sample(k, model_output, sample) if pred_original_sample is None else pred_original_sample
            transition = self._transition(k, clean, sample)
            if self.kernel(k)[2] > 0:
                output = self._score(transition, back, clean, generator, prev_sample)
            else:
                output = self._deterministic_output(SDESchedulerOutput(transition.mean), back, prev_sample, clean)
        self._step_index = k + 1
        return output if return_dict else (output.prev_sample, output.pred_original_sample)
