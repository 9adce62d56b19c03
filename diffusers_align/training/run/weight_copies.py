"""Copies of the trainable weights: what a checkpoint keeps, a moving average, and an old policy that lags behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn


class LaggingWeights:
    """A copy of `parameters` that moves to them by `update`, stands in for them within `applied`, and is part of checkpoints.

    Register it with `run.register` before `run.resume`.
    """

    def __init__(self, parameters: list[nn.Parameter]):
        self.parameters = list(parameters)
        self.values = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """values <- decay * values + (1 - decay) * parameters; 0 copies the parameters, bit for bit."""
        for value, parameter in zip(self.values, self.parameters):
            value.lerp_(parameter.detach(), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The copy in the place of the live weights; these come back at the end, also on an exception."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        # Storage for storage: graphs that hold the live weights stay valid.
        for i, parameter in enumerate(self.parameters):
            self.values[i], parameter.data = parameter.data, self.values[i]

    def state_dict(self) -> dict[str, Tensor]:
        return {f"{i:05d}": value.cpu().clone() for i, value in enumerate(self.values)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for i, value in enumerate(self.values):
            value.copy_(state[f"{i:05d}"])


class CheckpointedWeights:
    """The trainable parameters as something that a checkpoint keeps, in float32 and in order."""

    def __init__(self, parameters: list[nn.Parameter]):
        self.parameters = parameters

    def state_dict(self) -> dict[str, Tensor]:
        return {f"{i:05d}": p.detach().cpu().clone() for i, p in enumerate(self.parameters)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        parameters = self.parameters
        if len(parameters) != len(state) or any(p.shape != state[f"{i:05d}"].shape for i, p in enumerate(parameters)):
            raise ValueError("The checkpoint's weights have other shapes: resume with the model, --rank and --lora_layers that it was trained with.")
        for i, parameter in enumerate(parameters):
            parameter.copy_(state[f"{i:05d}"])


class Averaged:
    """Context: a moving average in the place of the live weights; nothing if it is None."""

    def __init__(self, ema: EMAModel | None, parameters: list[nn.Parameter]):
        self.ema, self.parameters = ema, parameters

    def __enter__(self) -> None:
        if self.ema is not None:
            self.ema.store(self.parameters)
            self.ema.copy_to(self.parameters)

    def __exit__(self, *exception) -> None:
        if self.ema is not None:
            self.ema.restore(self.parameters)
