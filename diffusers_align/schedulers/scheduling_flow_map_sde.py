r"""Flow maps as policies: walk on below the next noise level, and noise up to it.

A flow map (AnyFlow, https://arxiv.org/abs/2605.13724) moves a state from any noise level to any lower one along the ODE. Its stock sampler draws nothing.
As in TCD (https://arxiv.org/abs/2402.19159, there for consistency trajectories), a step from $\sigma$ to $\sigma'$ goes first to
$s = (1 - \gamma)\sigma'$, and then forward again:

$$ x_{\sigma'} \sim \mathcal N\big(a\, x_s,\; (\sigma'^2 - a^2 s^2) I\big), \qquad a = \frac{1 - \sigma'}{1 - s}, \qquad
x_s = x_\sigma + (s - \sigma)\, u(x_\sigma, \sigma, s). $$

For an exact map the marginals are exact, for any $\gamma$ and any number of steps.
"""

from __future__ import annotations

import torch
from diffusers import FlowMapEulerDiscreteScheduler
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from ..checks.ranges import Probability, check_value
from .own_noise import Draw, OwnNoiseMixin, as_std, of_each
from .scheduling_utils import Generator, SDESchedulerOutput


class FlowMapSDEScheduler(OwnNoiseMixin, FlowMapEulerDiscreteScheduler):
    """`FlowMapEulerDiscreteScheduler` that noises up behind each jump, with the log-probability of that noise.

    Pipelines tell the model where a step ends by `sigmas[k + 1]`: where the jump ends, here. `timesteps` are where steps begin.

    Args:
        eta: gamma above, from 0 (the stock step, bit for bit) to 1 (each jump goes to the clean sample, as in consistency sampling).

    The other arguments are the stock scheduler's. `deterministic` is the stock sampler, if it is set before `set_timesteps`, as a policy does.
    """

    jumps, tuple_length = True, 1

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000, shift: float = 1.0, eta: float = 0.3):
        check_value("eta", eta, Probability)
        # By keyword: the parent would register positional values as its defaults, and copies would lose them.
        super().__init__(num_train_timesteps=num_train_timesteps, shift=shift)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device = None,
        sigmas: list[float] | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """The stock schedule, of which `sigmas` has the ends of the jumps."""
        super().set_timesteps(num_inference_steps, device, sigmas, timesteps)
        self.levels = self.sigmas.clone()
        if not self.deterministic:
            self.sigmas[1:] *= 1 - self.config.eta

    def _has_noise(self, k: int) -> bool:
        return float(self.sigmas[k + 1]) < float(self.levels[k + 1])

    def clean_sample(self, model_output: Tensor, timestep, sample: Tensor) -> Tensor:
        """The clean sample (B, *D) on the straight line of the jump."""
        return sample - of_each(timestep, sample) / self.config.num_train_timesteps * model_output

    def _draw(self, model_output: Tensor, k: int, sample: Tensor, timestep=None) -> Draw:
        level, below, following = self.levels[k], self.sigmas[k + 1], self.levels[k + 1]
        walked = sample - (level - below) * model_output
        scale = (1 - following) / (1 - below)
        std = (following**2 - (scale * below) ** 2).clamp(min=0).sqrt()
        return Draw((scale * walked).float(), as_std(std, sample), sample - (level * model_output).float())

    def _stock_step(self, model_output: Tensor, timestep, sample: Tensor, generator: Generator):
        k, jumps = self.step_index if self.step_index is not None else self.step_position(timestep), self.sigmas
        self.sigmas = self.levels
        try:
            return FlowMapEulerDiscreteScheduler.step(self, model_output, self.timesteps[k], sample)
        finally:
            self.sigmas = jumps

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        r_timestep: float | Tensor | None = None,
        return_dict: bool = True,
        *,
        generator: Generator = None,
        prev_sample: Tensor | None = None,
    ) -> SDESchedulerOutput | tuple:
        """One step. `prev_sample` (B, *D) is scored and returned instead of a fresh draw.

        Raises:
            ValueError: an `r_timestep`: where a step ends is the schedule's.
        """
        if r_timestep is not None:
            raise ValueError("A step with noise ends where the schedule says: leave r_timestep out, or give the pipeline the stock scheduler.")
        return super().step(model_output, timestep, sample, generator, return_dict, prev_sample=prev_sample)
