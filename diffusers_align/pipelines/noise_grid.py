"""The noise levels along any stock solver's walk, and how it scales its states and reads the model's output.

`forward_process` serves training, at any timestep of a policy's own scheduler. Guidance walks the pipeline's stock solver instead, whose
timesteps may lie between the rows of the table and whose states may be scaled differently, so everything is read off its run-time state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ..algorithms.guidance import Level
from ..schedulers.twin import NO_KERNEL, own_noise_twin


@dataclass(frozen=True)
class NoiseGrid:
    """K steps that are left, in the model's coordinates: alpha^2 + sigma^2 = 1, or alpha + sigma = 1 for flow matching.

    Attributes:
        levels: K + 1, of each step's state and last of the final one.
        scales: K + 1, the solver's state divided by the model's coordinates: sqrt(1 + sigma^2) where its variance explodes, else 1.
        prediction: `epsilon`, `v_prediction`, `sample` or `flow`.
        sign: -1 where time, and with it the velocity, runs the other way.
        first: index of the first step in the solver's schedule.
        data: latents divided by the model's clean samples: EDM's sigma_data, else 1. The scales hold it too.
    """

    levels: list[Level]
    scales: list[float]
    prediction: str
    sign: int
    first: int
    data: float = 1.0

    def __len__(self) -> int:
        return len(self.levels) - 1


def noise_grid(scheduler, timestep) -> NoiseGrid:
    """Of a scheduler at the step that leaves `timestep`.

    Raises:
        ValueError: its states or its outputs have no conversion here.
    """
    name = type(scheduler).__name__
    for prefix, reason in NO_KERNEL.items():
        if name.startswith(prefix):
            raise ValueError(f"{name} cannot be guided: {reason}. Give the pipeline a DDIM, Euler, Heun, DPM-Solver++ or FlowMatchEuler scheduler.")
    if own_noise_twin(scheduler) is not None:
        raise ValueError(
            f"{name} cannot be guided: its steps draw around clean samples of the model's own (consistency samplers, flow maps, learned variances), and a "
            "guided output has no conversion there. Steer particles or choose the best of n, which only look at samples, or give the pipeline a DDIM scheduler "
            "if its model allows."
        )
    first, config = position(scheduler, timestep), scheduler.config
    if hasattr(scheduler, "precondition_outputs"):
        return _edm_grid(scheduler, first)
    flow = name.startswith("FlowMatch") or config.get("prediction_type") == "flow_prediction"
    if flow and float(scheduler.sigmas[first:].max()) > 1:  # flow matching has no such noise: states explode, and their derivative is the noise
        levels = _diffusion_levels(scheduler, first)
        return NoiseGrid(levels, [1 / level.alpha for level in levels], "epsilon", 1, first)
    if flow:
        inverted = bool(config.get("invert_sigmas"))
        sigmas = [1 - s if inverted else s for s in scheduler.sigmas[first:].tolist()]
        return NoiseGrid([Level(1 - s, s) for s in sigmas], [1.0] * len(sigmas), "flow", -1 if inverted else 1, first)
    if not hasattr(scheduler, "scale_model_input"):
        raise ValueError(
            f"{name} cannot be guided: nothing says what its states and its model's outputs are (no scale_model_input, no FlowMatch in its name). Give the "
            "pipeline a FlowMatchEuler scheduler if its model allows."
        )
    levels = _diffusion_levels(scheduler, first)
    explodes = hasattr(scheduler, "sigmas") and scheduler.scale_model_input(scheduler.sigmas.new_ones(1), timestep).item() != 1
    scales = [1 / level.alpha if explodes else 1.0 for level in levels]
    return NoiseGrid(levels, scales, config.get("prediction_type", "epsilon"), 1, first)


def _edm_grid(scheduler, first: int) -> NoiseGrid:
    """EDM's preconditioning: its output is v, or -v, of the state divided by sigma_data sqrt(1 + s^2), at the level s = sigma / sigma_data."""
    data, sign = scheduler.config.sigma_data, 1 if scheduler.config.prediction_type == "v_prediction" else -1
    levels = [Level(1 / math.hypot(1, s), s / math.hypot(1, s)) for s in (scheduler.sigmas[first:].double() / data).tolist()]
    return NoiseGrid(levels, [data / level.alpha for level in levels], "v_prediction", sign, first, data)


def check_scale(grid: NoiseGrid, k: int, scheduler, timestep) -> None:
    """Raise a ValueError if the solver scales the state of step k otherwise than the grid says."""
    if grid.scales[k] == 1 or not hasattr(scheduler, "scale_model_input"):
        return
    scale = 1 / scheduler.scale_model_input(scheduler.sigmas.new_ones(1), timestep).item()
    if not math.isclose(scale, grid.scales[k], rel_tol=1e-3):
        raise ValueError(
            f"{type(scheduler).__name__} evaluates the model between its noise levels, which has no conversion here. Give the pipeline a DDIM, "
            "Euler, Heun or DPM-Solver++ scheduler."
        )


def position(scheduler, timestep) -> int:
    """The index of the step that leaves `timestep` in the scheduler's own schedule."""
    for name in ("step_index", "begin_index"):
        if (index := getattr(scheduler, name, None)) is not None:
            return int(index)
    if isinstance(timestep, Tensor) and timestep.numel() > 1:
        raise ValueError("Timesteps that differ between samples cannot be guided.")
    return int((scheduler.timesteps == timestep).nonzero()[0])


def _diffusion_levels(scheduler, first: int) -> list[Level]:
    if hasattr(scheduler, "sigmas"):
        # Ratios of noise to signal, whatever the scale of the states.
        return [Level(1 / math.hypot(1, s), s / math.hypot(1, s)) for s in scheduler.sigmas[first:].double().tolist()]
    if getattr(scheduler, "alphas_cumprod", None) is None:
        raise ValueError(f"{type(scheduler).__name__} cannot be guided: it has neither sigmas nor an alphas_cumprod table.")
    rows = scheduler.alphas_cumprod.double().cpu()[scheduler.timesteps[first:].cpu().long()].tolist()
    return [Level(math.sqrt(a), math.sqrt(1 - a)) for a in rows] + [Level(1.0, 0.0)]
