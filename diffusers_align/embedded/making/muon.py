"""Muon (https://kellerjordan.github.io/posts/muon/) for the inner weights of a network, convolutions included, AdamW for the rest."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Muon:
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
        self.weights = weights
        self.flat = [weight.detach().flatten(1) for weight in weights]
        self.stepper = torch.optim.Muon(self.flat, rate, weight_decay=weight_decay, momentum=0.95, adjust_lr_fn="original")

    def step(self) -> None:
        """One update from the weights' gradients; weights without one stay."""
        for flat, weight in zip(self.flat, self.weights):
            flat.grad = None if weight.grad is None else weight.grad.flatten(1)
        self.stepper.step()

    def set_rate(self, rate: float) -> None:
        """The learning rate of the updates to come."""
        for group in self.stepper.param_groups:
            group["lr"] = rate

    def state(self) -> list[dict[str, Tensor]]:
        """What a resumed run must have, weight by weight; the tensors themselves."""
        return [self.stepper.state[flat] for flat in self.flat]


class AdamW:
    """`torch.optim.AdamW`, fused, with the same three methods as `Muon`."""

    def __init__(self, weights: list[nn.Parameter], rate: float, weight_decay: float = 0.01):
        self.weights = weights
        self.stepper = torch.optim.AdamW(weights, rate, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)

    def step(self) -> None:
        """One update from the weights' gradients."""
        self.stepper.step()

    def set_rate(self, rate: float) -> None:
        """The learning rate of the updates to come."""
        for group in self.stepper.param_groups:
            group["lr"] = rate

    def state(self) -> list[dict[str, Tensor]]:
        """What a resumed run must have, weight by weight; the tensors themselves."""
        return [self.stepper.state[weight] for weight in self.weights]


def is_inner(name: str, weight: Tensor) -> bool:
    """Is this a weight for Muon: a matrix or a convolution inside a block or a layer? Embeddings, inputs, outputs, norms and biases are not."""
    return weight.ndim >= 2 and ("block" in name or "layers." in name)


def split(modules: list[nn.Module]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters of all modules: those for Muon, and the rest."""
    named = [(name, weight) for module in modules for name, weight in module.named_parameters()]
    return [w for n, w in named if is_inner(n, w)], [w for n, w in named if not is_inner(n, w)]
