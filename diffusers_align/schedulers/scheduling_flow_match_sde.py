"""Flow matching as a policy: the probability-flow ODE turned into an SDE with a Gaussian kernel and a log-probability."""

from __future__ import annotations

import inspect

import numpy as np
import torch
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from ..checks.ranges import NonNegative, Probability, check_value
from ..transition import GaussianTransition
from .kernels import KERNELS, Kernel
from .scheduling_utils import Generator, SDESchedulerMixin, SDESchedulerOutput, build_source, check_window, returned


class FlowMatchSDEScheduler(SDESchedulerMixin, FlowMatchEulerDiscreteScheduler):
    """`FlowMatchEulerDiscreteScheduler` whose `step` draws from a stochastic kernel and returns its log-probability.

    Args:
        sde_type: the kernel: `flow_grpo`, `dance_grpo`, `memoryless`, `memoryless_em` or `cps` (`diffusers_align.schedulers.kernels`).
        noise_level: strength of the noise, the papers' a or eta: 0.7 for Flow-GRPO on SD3.5, 0.3 for DanceGRPO, 0.8 for CPS; or
            one value a solver step. 0 gives the stock step, bit for bit. The memoryless kernels know only "0" and "on".
        sde_window: (first, last + 1): solver steps that are stochastic; the stock ODE step is taken elsewhere.
        source: config of a stock scheduler with flow sigmas (UniPC, DPM-Solver ...) whose schedule this one follows. Written
            by `sde_twin`.

    The other arguments are the parent's, dynamic shifting included.
    """

    init_noise_sigma = 1.0
    tuple_length = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: str = "exponential",
        stochastic_sampling: bool = False,
        sde_type: str = "flow_grpo",
        noise_level: float | list[float] = 0.7,
        sde_window: tuple[int, int] | list[int] | None = None,
        source: dict | None = None,
    ):
        # By keyword: the parent would register positional values as its defaults, and copies would lose them.
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            shift=shift,
            use_dynamic_shifting=use_dynamic_shifting,
            base_shift=base_shift,
            max_shift=max_shift,
            base_image_seq_len=base_image_seq_len,
            max_image_seq_len=max_image_seq_len,
            invert_sigmas=invert_sigmas,
            shift_terminal=shift_terminal,
            use_karras_sigmas=use_karras_sigmas,
            use_exponential_sigmas=use_exponential_sigmas,
            use_beta_sigmas=use_beta_sigmas,
            time_shift_type=time_shift_type,
            stochastic_sampling=stochastic_sampling,
        )
        if stochastic_sampling:
            raise ValueError("stochastic_sampling draws noise that has no log-probability here; sde_type='cps' with noise_level=1 draws the same.")
        if sde_type not in KERNELS:
            raise ValueError(f"Unknown sde_type {sde_type!r}; choose one of {', '.join(KERNELS)}.")
        for level in noise_level if isinstance(noise_level, (list, tuple)) and len(noise_level) > 0 else [noise_level]:
            check_value("noise_level", level, Probability if sde_type == "cps" else NonNegative)
        check_window(sde_window)
        self._source = build_source(source)
        self._sigma_list = self.sigmas.tolist()

    @classmethod
    def _get_compatibles(cls):
        """Those with flow sigmas that it follows, too, whose entries its config holds."""
        kinds = (UniPCMultistepScheduler, DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler, DEISMultistepScheduler, SASolverScheduler)
        return [*super()._get_compatibles(), *kinds]

    # What other schedulers have and some pipelines call on a flow-matching one too.

    def scale_model_input(self, sample: Tensor, timestep=None) -> Tensor:
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.scale_noise(original_samples, timesteps, noise)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """The parent's schedule, or that of the `source` scheduler if there is one.

        Raises:
            ValueError: timesteps or sigmas where the source takes none.
        """
        if self._source is None:
            super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        else:
            accepted = inspect.signature(self._source.set_timesteps).parameters
            given = {name: value for name, value in (("timesteps", timesteps), ("sigmas", sigmas)) if value is not None}
            if unknown := sorted(set(given) - set(accepted)):
                raise ValueError(f"{type(self._source).__name__} takes no {unknown[0]} of one's own: give num_inference_steps.")
            given |= {"mu": mu} if mu is not None and "mu" in accepted else {}  # as the parent, which reads it where it shifts by it
            self._source.set_timesteps(num_inference_steps, device=device, **given)
            self.num_inference_steps = len(self._source.timesteps)
            # Float timesteps: the parent refuses integers, because they look like step indices.
            self.timesteps, self.sigmas = self._source.timesteps.float(), self._source.sigmas.to(device)
            self._step_index = self._begin_index = None
        self._sigma_list = self.sigmas.tolist()
        if max(self._sigma_list) > 1 + 1e-4:
            raise ValueError(f"Noise levels up to {max(self._sigma_list):.4g} are none of flow matching, where 1 is pure noise: there is no kernel here.")

    def stand_in(self, timesteps: Tensor) -> None:
        """Also the noise levels where all samples share a row's time: some pipelines tell them to the denoiser. Of a time of the schedule it is the level as
        it is there, bit for bit."""
        if timesteps.ndim == 1:
            most = float(self.config.num_train_timesteps)
            known = dict(sorted({0.0: 0.0, most: 1.0, **dict(zip(self.timesteps.tolist(), self._sigma_list))}.items()))
            levels = np.interp(timesteps.tolist(), list(known), list(known.values()))
            self.sigmas = torch.tensor([*levels, self._sigma_list[-1]]).to(self.sigmas)
        super().stand_in(timesteps)

    def _noise_at(self, k: int) -> float:
        level = self.config.noise_level
        if not self._draws_at(k):
            return 0.0
        if not isinstance(level, (list, tuple)):
            return level
        if k >= len(level):
            raise ValueError(f"noise_level has {len(level)} values, one a solver step, and none for step {k}: give one number for all, or as many as steps.")
        return level[k]

    def kernel(self, k: int) -> Kernel:
        """Weights and standard deviation of solver step k; std is 0 where the stock step is taken."""
        noise, inverted = self._noise_at(k), self.config.invert_sigmas
        sigma, sigma_next, second = (1 - s if inverted else s for s in (*self._sigma_list[k : k + 2], self._sigma_list[1]))
        if noise > 0 and sigma_next < sigma:
            x_weight, v_weight, std = KERNELS[self.config.sde_type](sigma, sigma_next, noise, second)
            if std > 0:
                return Kernel(x_weight, -v_weight if inverted else v_weight, std)
        return Kernel(1.0, self._sigma_list[k + 1] - self._sigma_list[k], 0.0)

    @property
    def stochastic_steps(self) -> Tensor:
        return torch.tensor([self.kernel(k).std > 0 for k in range(len(self.timesteps))])

    def step_position(self, timestep) -> int:
        timestep = timestep.to(self.timesteps.device) if isinstance(timestep, Tensor) else timestep
        matches = (self.timesteps == timestep).nonzero()
        if len(matches) == 0:
            raise ValueError(f"Timestep {timestep} is not one of the scheduler's {len(self.timesteps)} timesteps; pass one of `scheduler.timesteps`.")
        return int(matches[0])

    def transition(self, model_output: Tensor, timestep, sample: Tensor) -> GaussianTransition:
        """The kernel of the step that leaves `timestep`, for the velocity (B, *D) at the state `sample` (B, *D), in float32."""
        return self._transition(self.step_position(timestep), model_output, sample)

    def skip_step(self, timestep) -> None:
        if self.step_index is None:
            self._init_step_index(timestep)
        self._step_index += 1

    def _transition(self, k: int, model_output: Tensor, sample: Tensor) -> GaussianTransition:
        x_weight, v_weight, std = self.kernel(k)
        mean = x_weight * sample.float() + v_weight * model_output.float()
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
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
        *,
        prev_sample: Tensor | None = None,
    ) -> SDESchedulerOutput | tuple:
        """One reverse step. With `return_dict=False`, the stock tuple (prev_sample,).

        `prev_sample` (B, *D) is scored and returned instead of a fresh draw. The `s_` arguments are the parent's and unused.

        `per_token_timesteps` (B, T) of a state (B, T, *D): tokens at the step's own time are drawn; those of a condition, at a time below it, take the
        stock step, and have no part in the log-probability. As in the stock scheduler, `model_output` is then minus the velocity.
        """
        if self.step_index is None:
            self._init_step_index(timestep)
        k = self.step_index
        if self.kernel(k).std == 0 or (per_token_timesteps is not None and not bool(self._drawn(k, per_token_timesteps).any())):
            stock = FlowMatchEulerDiscreteScheduler.step(self, model_output, timestep, sample, generator=generator, per_token_timesteps=per_token_timesteps)
            clean = self._clean(k, model_output, sample) if per_token_timesteps is None else None
            output = self._deterministic_output(stock, returned(sample, model_output), prev_sample, clean)
        else:
            if per_token_timesteps is None:
                transition, clean = self._transition(k, model_output, sample), self._clean(k, model_output, sample)
            else:
                transition, clean = self._per_token(k, model_output, sample, per_token_timesteps)
            output = self._score(transition, returned(sample, model_output), clean, generator, prev_sample)
            self._step_index += 1
        return output if return_dict else (output.prev_sample,)

    def _drawn(self, k: int, times: Tensor) -> Tensor:
        """Which tokens stand at the step's own time, (B, T); those of a condition stand below."""
        return times / self.config.num_train_timesteps > self._sigma_list[k] - 1e-6

    def _per_token(self, k: int, model_output: Tensor, sample: Tensor, times: Tensor) -> tuple[GaussianTransition, Tensor]:
        """The step's kernel for tokens at its own time, and no noise for those below; with the clean sample."""
        drawn, levels = (x.reshape(*times.shape, *[1] * (sample.ndim - times.ndim)) for x in (self._drawn(k, times), times / self.config.num_train_timesteps))
        velocity = -model_output.float()
        kernel = self._transition(k, velocity, sample)
        below = torch.where(self.sigmas.to(levels) < levels[..., None] - 1e-6, self.sigmas.to(levels), 0.0).amax(-1)
        held = sample.float() + (below - levels) * velocity
        transition = GaussianTransition(torch.where(drawn, kernel.mean, held), torch.where(drawn, kernel.std, 0.0))
        return transition, sample.float() - levels * velocity

    def _clean(self, k: int, model_output: Tensor, sample: Tensor) -> Tensor:
        sigma = self._sigma_list[k]
        weight = 1 - sigma if self.config.invert_sigmas else -sigma
        return sample.float() + weight * model_output.float()
