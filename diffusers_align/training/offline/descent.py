"""A loss of the errors that model and reference make at noised latents: the reference, the errors, the gradient in one pass or two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...driving.prompt_form import takes_one_prompt
from ...policy import Policy
from ...rl.matching import error_coefficients
from ..run.weight_copies import LaggingWeights
from .noised_latents import Noised, predict, predict_together


class Reference:
    """What the model is measured against: the pretrained one, or an average that follows the model, as in Linear-DPO.

    Args:
        decay: of the average at each optimizer step; None for the pretrained model.
    """

    def __init__(self, run, policy: Policy, decay: float | None = None):
        self.run, self.policy, self.decay = run, policy, decay
        self.lagging = None if decay is None else LaggingWeights(policy.trainable_parameters())
        if self.lagging is not None:
            run.register("moving_reference", self.lagging)

    @torch.no_grad()
    def __call__(self, *sides: Noised) -> None:
        """Give each of `sides` what the reference answers there, by the same forward pass as the model's own answer: rounding is no preference."""
        with self.lagging.applied() if self.lagging is not None else self.policy.reference():
            for side, answer in zip(sides, answers(self.run, self.policy, sides)):
                side.reference = answer

    def follow(self) -> None:
        """After each optimizer step; one that a loss scaler skipped is none."""
        if self.lagging is not None and not self.run.step_skipped:
            self.lagging.update(self.decay)


def answers(run, policy: Policy, sides: Sequence[Noised]) -> Sequence[Tensor]:
    """The model's answer to each of the sides, (B, *D): all in one forward pass; with `--two_pass`, which takes half the memory, and where the pipeline takes
    one prompt a call, side by side."""
    if getattr(run.args, "two_pass", False) or takes_one_prompt(policy.calls):
        return [predict(run, policy, side) for side in sides]
    return predict_together(run, policy, sides)


@dataclass
class Measured:
    """Of the model's answer at a batch: its error (B,), its distance to the reference's (B,), and itself (B, *D), without a graph."""

    error: Tensor
    distance: Tensor
    output: Tensor

    def detach(self) -> Measured:
        return Measured(self.error.detach(), self.distance.detach(), self.output)


def measure(run, policy: Policy, *sides: Noised) -> list[Measured]:
    """The model's answer to each side and its errors (B,), with their graph where autograd is on."""
    outputs = zip(sides, answers(run, policy, sides))
    return [Measured(side.error(output), side.distance(output), output.detach()) for side, output in outputs]


def descend(
    run, policy: Policy, loss: Callable[..., Tensor], sides: list[Noised], weight: float, measured: list[Measured] | None = None
) -> tuple[Tensor, list[Measured]]:
    """Add the gradient of `weight` * sum(loss) to the parameters'.

    With `--two_pass` all is measured without a graph, and then the gradient is made side by side from the loss's derivatives: the same numbers, with
    the activations of one side in memory, for one more forward pass a side.

    Args:
        loss: a function of each side's `Measured` to (B,). It may be differentiated by errors and distances.
        measured: of `sides`, with graphs, where they were measured before: not done again. Not with `--two_pass`, which has no graphs to give.

    Returns:
        The loss (B,) and what was measured at each side, without graphs.
    """
    if not getattr(run.args, "two_pass", False):
        found = measure(run, policy, *sides) if measured is None else measured
        value = loss(*found)
        run.accelerator.backward(value.sum() * weight)
        return value.detach(), [m.detach() for m in found]
    with torch.no_grad():
        found = measure(run, policy, *sides)

    def of(*numbers: Tensor) -> Tensor:
        return loss(*(Measured(error, distance, m.output) for error, distance, m in zip(numbers[::2], numbers[1::2], found)))

    value, coefficients = error_coefficients(of, *(number for m in found for number in (m.error, m.distance)))
    for side, by_error, by_distance in zip(sides, coefficients[::2], coefficients[1::2]):
        (again,) = measure(run, policy, side)
        run.accelerator.backward((by_error * again.error + by_distance * again.distance).sum() * weight * len(value))
    return value, found
