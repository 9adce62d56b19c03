"""What a checkpoint keeps of the objects of torch, diffusers and accelerate: each adapter has `state_dict` and `load_state_dict`.

A run's hyper-parameters come from its flags, also when it is resumed: the states hold moments, averages and counters, and where one holds a
hyper-parameter as well, the flag wins. With the flags unchanged that gives the same bits.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class OptimizerState:
    """Adam's moments and step counts; learning rate, betas, epsilon and weight decay stay those of the flags."""

    def __init__(self, optimizer: Optimizer):
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        flags = [{name: value for name, value in group.items() if name != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state)
        for group, values in zip(self.optimizer.param_groups, flags):
            group.update(values)


class ScheduleState:
    """How many steps the learning-rate schedule has made; its form, its length and the peak stay those of the flags."""

    def __init__(self, scheduler: LambdaLR):
        self.scheduler = scheduler

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.scheduler.last_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        scheduler = self.scheduler
        scheduler.last_epoch, scheduler._step_count = state["steps"], state["steps"] + 1
        # In closed form, as the schedule itself computes them: the rate of the next step is that of this run's schedule.
        scheduler._last_lr = [peak * form(state["steps"]) for peak, form in zip(scheduler.base_lrs, scheduler.lr_lambdas)]
        for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr):
            group["lr"] = rate


class AverageState:
    """The moving average and how many updates it has seen; its decay stays that of the flags."""

    def __init__(self, average: EMAModel):
        self.average = average

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.average.optimization_step, "weights": list(self.average.shadow_params)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average.optimization_step = state["steps"]
        for mine, saved in zip(self.average.shadow_params, state["weights"], strict=True):
            mine.copy_(saved)

    @torch.no_grad()
    def start_from(self, parameters: list[torch.nn.Parameter]) -> None:
        """The average of a run that has none yet is where the weights are."""
        self.load_state_dict({"steps": 0, "weights": [parameter.detach() for parameter in parameters]})


def random_state(device: torch.device) -> dict[str, Any]:
    """This process's random generators: Python's, numpy's, torch's on the CPU and on `device`."""
    name, keys, *rest = np.random.get_state()
    accelerator = _device_generators(device)
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *(float(value) if isinstance(value, float) else int(value) for value in rest)),
        "torch": torch.get_rng_state(),
        "device": accelerator.get_rng_state(device) if accelerator else None,
    }


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Set the generators to what `random_state` gave, as far as this machine has them."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    accelerator = _device_generators(device)
    if accelerator and state["device"] is not None:
        accelerator.set_rng_state(state["device"], device)


def _device_generators(device: torch.device):
    """torch's module for an accelerator, such as `torch.cuda`; None for the CPU."""
    module = None if device.type == "cpu" else torch.get_device_module(device)
    return module if hasattr(module, "get_rng_state") else None
