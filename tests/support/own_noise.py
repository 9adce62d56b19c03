"""Stock schedulers that draw from a Gaussian themselves, with model outputs for them; each beside its twin."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from schedules import gen, randn

from diffusers_align import sde_twin

IF = {"beta_schedule": "squaredcos_cap_v2", "thresholding": True, "dynamic_thresholding_ratio": 0.95, "sample_max_value": 1.5}


@dataclass(frozen=True)
class Row:
    """A scheduler, the number of its steps, and how many of the last draw nothing.

    Attributes:
        halves: the model answers with twice the channels.
        stock: arguments of the stock step that the twin has in its config.
    """

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    steps: int = 4
    halves: bool = False
    stock: dict[str, Any] = field(default_factory=dict)
    twin: dict[str, Any] = field(default_factory=dict)

    def pair(self):
        """The stock scheduler and its twin, on the same schedule."""
        stock = getattr(diffusers, self.name)(**self.config)
        twin = sde_twin(getattr(diffusers, self.name)(**self.config), **self.twin)
        return begun(stock, self.steps), begun(twin, self.steps)

    def output(self, k: int, state: torch.Tensor) -> torch.Tensor:
        """What a model might answer: it depends on the state."""
        answer = torch.tanh(state) + 0.1 * randn(k + 1, state.shape)
        if not self.halves:
            return answer
        # Variances themselves where they are "learned", weights of their logarithms where "learned_range".
        return torch.cat([answer, answer.square() + 0.1 if self.config["variance_type"] == "learned" else answer], 1)

    def call(self, scheduler, k: int) -> dict[str, Any]:
        """What a pipeline passes beside output, time and state."""
        if self.name == "UnCLIPScheduler":
            return {"prev_timestep": scheduler.timesteps[k + 1] if k + 1 < self.steps else None}
        return self.stock if type(scheduler).__name__ == self.name else {}

    def times(self, scheduler):
        """The times at which the pipeline steps, as it passes them."""
        times = scheduler.timesteps[: self.steps]
        return [t.expand(2) for t in times] if self.name in ("SCMScheduler", "DDPMWuerstchenScheduler") else list(times)


def begun(scheduler, steps: int):
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index") and not hasattr(scheduler, "is_scale_input_called"):
        scheduler.set_begin_index(0)
    if hasattr(scheduler, "is_scale_input_called"):
        scheduler.is_scale_input_called = True
    return scheduler


def walked(row: Row, scheduler, generator, state=None, given=None):
    """The outputs of all steps; `given` are next states to score."""
    state, found = randn(0) if state is None else state, []
    for k, t in enumerate(row.times(scheduler)):
        extra = {"prev_sample": given[k]} if given is not None else {}
        found.append(scheduler.step(row.output(k, state), t, state, generator=generator, **row.call(scheduler, k), **extra))
        state = found[-1].prev_sample
    return found


ROWS = {
    "lcm": Row("LCMScheduler"),
    "lcm one step": Row("LCMScheduler", steps=1),
    "lcm v": Row("LCMScheduler", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
    "lcm sample, clipped": Row("LCMScheduler", {"prediction_type": "sample", "clip_sample": True}),
    "tcd": Row("TCDScheduler", stock={"eta": 0.3}),
    "tcd all noise": Row("TCDScheduler", stock={"eta": 1.0}, twin={"eta": 1.0}),
    "tcd v": Row("TCDScheduler", {"prediction_type": "v_prediction"}, stock={"eta": 0.5}, twin={"eta": 0.5}),
    "flow lcm": Row("FlowMatchLCMScheduler", {"shift": 3.0}),
    "scm": Row("SCMScheduler", steps=2),
    "cm": Row("CMStochasticIterativeScheduler", steps=3),
    "if": Row("DDPMScheduler", IF | {"variance_type": "learned_range"}, 5, True),
    "ddpm learned": Row("DDPMScheduler", {"variance_type": "learned", "prediction_type": "v_prediction"}, 5, True),
    "unclip decoder": Row("UnCLIPScheduler", {"variance_type": "learned_range"}, 5, True),
    "unclip prior": Row("UnCLIPScheduler", {"prediction_type": "sample", "clip_sample_range": 5.0}, 5),
    "wuerstchen": Row("DDPMWuerstchenScheduler", steps=5),
}  # fmt: skip


def generator(seed: int = 7):
    return gen(seed)
