"""Muon (https://kellerjordan.github.io/posts/muon/) for the inner weights of a network, convolutions included, AdamW for the rest."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class _Stepper:
    """An optimizer of torch's over `keys`, the tensors that it steps."""

    def __init__(self, keys: list[Tensor], optimizer: torch.optim.Optimizer):
        self.keys, self.optimizer = keys, optimizer

    def step(self) -> None:
        """One update from the weights' gradients; weights without one stay."""
        self.optimizer.step()

    def set_rate(self, rate: float) -> None:
        """The learning rate of the updates to come."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def state(self) -> list[dict[str, Tensor]]:
        """What a resumed run must have, weight by weight; the tensors themselves."""
        return [self.optimizer.state[key] for key in self.keys]


class Muon(_Stepper):
    """`torch.optim.Muon`, which takes matrices only, on weights of any shape: a convolution (out, in, k, k) is one matrix (out, in k k).

    Weights are stepped in place, through flat views of their memory. rate: learning rate of a square matrix; momentum is
    Nesterov's, 0.95.

    Raises:
        RuntimeError: this torch has no Muon.
        ValueError: a weight has fewer than two dimensions, or its memory is not contiguous.
    """

    def __init__(self, weights: list[nn.Parameter], rate: float, weight_decay: float = 0.01):
        if not hasattr(torch.optim, "Muon"):
            raise RuntimeError(f"torch {torch.__version__} has no torch.optim.Muon, with which the embedded pipelines are trained: install torch 2.9 or newer.")
        for weight in weights:
            if weight.ndim < 2 or not weight.is_contiguous():
                raise ValueError(f"Muon takes contiguous weights of two dimensions or more, not {tuple(weight.shape)}: give the others to AdamW.")
        self.weights, flat = weights, [weight.detach().flatten(1) for weight in weights]
        super().__init__(flat, torch.optim.Muon(flat, rate, weight_decay=weight_decay, momentum=0.95, adjust_lr_fn="original"))

    def step(self) -> None:
        """See `_Stepper`."""
        for flat, weight in zip(self.keys, self.weights):
            flat.grad = None if weight.grad is None else weight.grad.flatten(1)
        super().step()


class AdamW(_Stepper):
    """`torch.optim.AdamW`, fused."""

    def __init__(self, weights: list[nn.Parameter], rate: float, weight_decay: float = 0.01):
        super().__init__(weights, torch.optim.AdamW(weights, rate, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True))


def is_inner(name: str, weight: Tensor) -> bool:
    """Is this a weight for Muon: a matrix or a convolution inside a block or a layer? Embeddings, inputs, outputs, norms and biases are not."""
    return weight.ndim >= 2 and ("block" in name or "layers." in name)


def split(modules: list[nn.Module]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters of all modules: those for Muon, and the rest."""
    named = [(name, weight) for module in modules for name, weight in module.named_parameters()]
    return [w for n, w in named if is_inner(n, w)], [w for n, w in named if not is_inner(n, w)]
