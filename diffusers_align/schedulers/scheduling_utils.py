"""What the SDE schedulers share: drawing from the kernel, scoring a given action, rebuilding another scheduler's tables."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from ..checks.ranges import CountOrNone, check_value
from ..transition import GaussianTransition

Generator = torch.Generator | list[torch.Generator] | None


@dataclass
class SDESchedulerOutput(BaseOutput):
    """The output of `step`: diffusers' fields first, then what a policy needs.

    Attributes:
        prev_sample: (B, *D), the next state x_{t-1}, in the dtype and the memory layout of the state before it; in that of the model's output where
            that is the wider one.
        pred_original_sample: (B, *D), the clean sample that the model predicts, in the same dtype.
        log_prob: (B,) nats, of `prev_sample` as returned (after rounding); None at deterministic steps.
        prev_sample_mean: (B, *D), the kernel's mean, float32; at deterministic steps the stock step's result.
        std: (1, ..., 1) float32, or of each sample or element, the kernel's standard deviation; 0 at deterministic steps.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None
    log_prob: Tensor | None = None
    prev_sample_mean: Tensor | None = None
    std: Tensor | None = None


class SDESchedulerMixin:
    """Turns a stock scheduler into a policy. A subclass writes `transition`, `stochastic_steps`, `step_position` and a `step`
    with its parent's parameter list.

    Runtime state lives in plain attributes, never in the config:
        generator: draws the noise where the pipeline passes none (flow-matching pipelines never do); a list seeds each sample. A policy
            leaves it alone: its steps draw from streams that the driver hands to `step`.
        deterministic: True turns every step into the parent's own, bit for bit (evaluation, completions), without a log-probability. A parent that
            draws (`own_noise`) does so still.
        own_noise: the parent itself draws.
        replaced: the scheduler that it took the place of in a pipeline, if it did.
    """

    generator: Generator = None
    deterministic: bool = False
    own_noise: bool = False
    replaced = None
    tuple_length: int  # of the stock step with return_dict=False

    def transition(self, model_output: Tensor, timestep, sample: Tensor) -> GaussianTransition:
        """The Gaussian of the step that leaves `timestep`, at state `sample` (B, *D), for the model's output there."""
        raise TypeError(f"{type(self).__name__} must define transition(model_output, timestep, sample).")

    @property
    def stochastic_steps(self) -> Tensor:
        """(K,) bool over the current `timesteps`: where std > 0, so where a log-probability exists."""
        raise TypeError(f"{type(self).__name__} must define stochastic_steps.")

    def step_position(self, timestep) -> int:
        """Index k of the solver step that leaves `timestep`."""
        raise TypeError(f"{type(self).__name__} must define step_position(timestep).")

    @property
    def time_range(self) -> tuple[float, float]:
        """The times with the least and the most noise at which the model can be asked."""
        return 0.0, float(self.config.num_train_timesteps)

    def noise_weight(self, timestep: Tensor, sigma: Tensor | None = None) -> Tensor:
        """The weight of the noise, from 0 to 1, in states at these times: of states of unit variance, or of flow matching's.

        Args:
            sigma: what the schedule's own table has there, where it has one; some schedules round its times. None: by the time alone.
        """
        table = getattr(self, "alphas_cumprod", None)
        if table is not None:
            return (1 - table.double()[timestep.round().long().to(table.device)]).sqrt()
        level = timestep / self.config.num_train_timesteps if sigma is None else sigma
        return 1 - level if self.config.get("invert_sigmas") else level

    def stand_in(self, timesteps: Tensor) -> None:
        """Let `timesteps` take the place of the schedule's: rows (N,) or (N, B), for single evaluations."""
        self.timesteps = timesteps.to(self.timesteps)

    def _draws_at(self, k: int) -> bool:
        """Whether solver step k may have noise: always, but for `deterministic` and outside of the config's `sde_window`."""
        window = self.config.get("sde_window")
        return not self.deterministic and (window is None or window[0] <= k < window[1])

    def denoising_output(self, model_output: Tensor, sample: Tensor) -> Tensor:
        """The part of a model's output that has the shape of `sample` (B, *D) and is about the clean sample: all, where no variance is learned."""
        return model_output

    def skip_step(self, timestep) -> None:
        """Move on to the next solver step without computing this one: its outcome is already known."""

    def __deepcopy__(self, memo):
        """A copy with noise of its own: some pipelines copy their scheduler to denoise a second modality beside the first."""
        child = object.__new__(type(self))
        memo[id(self)] = child
        for name, value in self.__dict__.items():
            child.__dict__[name] = fork(value) if name == "generator" else copy.deepcopy(value, memo)
        return child

    def _deterministic_output(self, stock, sample: Tensor, prev_sample: Tensor | None, clean: Tensor | None) -> SDESchedulerOutput:
        drawn = as_state(stock.prev_sample, sample)
        std = torch.zeros([1] * drawn.ndim, device=drawn.device)
        clean = None if clean is None else clean.to(sample.dtype)
        return SDESchedulerOutput(drawn if prev_sample is None else prev_sample, clean, None, drawn, std)

    def _score(self, transition: GaussianTransition, sample: Tensor, clean: Tensor, generator: Generator, prev_sample: Tensor | None) -> SDESchedulerOutput:
        """Draw the next state unless it is given, round it as the pipeline will, and score what is left."""
        if prev_sample is None:
            drawn = transition.sample(self.generator if generator is None else generator, sample.dtype)
            prev_sample = as_state(drawn, sample)
        return SDESchedulerOutput(prev_sample, clean.to(sample.dtype), transition.log_prob(prev_sample), transition.mean, transition.std)

    @classmethod
    def _get_compatibles(cls):
        """diffusers looks names up in its own namespace only; we are compatible with ourselves, with our stock parents, and with what those are."""
        own = [c for c in cls.__mro__ if hasattr(c, "from_config") and c.__name__.endswith("Scheduler")]
        return [*own, *(c for c in super()._get_compatibles() if c not in own)]


def check_window(window: tuple[int, int] | list[int] | None) -> None:
    """Check an `sde_window`.

    Raises:
        ValueError: neither None nor two whole numbers (first, last + 1) with 0 <= first < last + 1.
    """
    if window is None:
        return
    if not isinstance(window, (list, tuple)) or len(window) != 2:
        raise ValueError(f"sde_window must be two whole numbers (first, last + 1), got {window!r}.")
    for end in window:
        check_value("sde_window", end, CountOrNone)
    if not window[0] < window[1]:
        raise ValueError(f"sde_window must be (first, last + 1) with 0 <= first < last + 1, got {tuple(window)}.")


def as_state(x: Tensor, state: Tensor) -> Tensor:
    """`x` (B, *D) in the dtype, on the device and in the memory layout of `state`: kernels round by all three, so a state that is handed
    to the pipeline again must have what the pipeline's own had."""
    alike = x.dtype == state.dtype and x.device == state.device and x.stride() == state.stride()
    return x if alike else torch.empty_like(state).copy_(x)


def returned(sample: Tensor, model_output: Tensor) -> Tensor:
    """`sample` (B, *D) in the precision of what a step from it returns: that of the model's output where that is the wider one, as in stock schedulers.
    Some pipelines begin in half precision and go on in float32."""
    return sample.to(torch.promote_types(sample.dtype, model_output.dtype))


def fork(generator: Generator) -> Generator:
    """Generators whose streams differ from the given ones but are fixed by them."""
    if isinstance(generator, list):
        return [fork(g) for g in generator]
    if generator is None:
        return None
    return torch.Generator(generator.device).manual_seed((generator.initial_seed() * 6364136223846793005 + 1442695040888963407) % 2**63)


def build_source(source: dict | None):
    """The stock scheduler that a twin copies its tables from, rebuilt from the `source` entry of the twin's config."""
    if source is None:
        return None
    import diffusers

    return getattr(diffusers, source["_class_name"]).from_config(dict(source))
