"""A second set of the trainable weights, which follows them at a distance: the old policy of an off-policy method."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class LaggingWeights:
    """A copy of `parameters` that moves to them by `update`, stands in for them within `applied`, and is part of checkpoints.

    Register it with `run.accelerator.register_for_checkpointing` before `run.resume`.
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
