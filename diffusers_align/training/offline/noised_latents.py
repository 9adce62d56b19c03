"""Latents with noise, which the position in training alone decides, and the model's answer to them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, cat, zeros_like

from ...condition import Condition
from ...forward_process import ForwardProcess
from ...policy import Policy
from ...rl.matching import matching_error
from .data_latents import Position


def as_they_are(args, accelerator) -> Namespace:
    """What `LatentImages`, `Noising` and `predict` want of a run, for measuring: no augmentation, timesteps uniform over the training range."""
    own = {"random_crop": False, "random_flip": False, "timestep_scheme": "uniform", "error_weighting": "native"}
    return Namespace(args=Namespace(**{"cache_dir": None, **vars(args), **own}), accelerator=accelerator)


@dataclass
class Noised:
    """Latents x_t (B, *D) with noise at per-sample timesteps t (B,), under their captions.

    Attributes:
        target: what a perfect model would answer there, (B, *D).
        weight: (B,), of the squared error.
        reference: what the reference answers, (B, *D), without a graph; None where none was asked.
    """

    x_t: Tensor
    t: Tensor
    condition: Condition
    target: Tensor
    weight: Tensor
    reference: Tensor | None = None

    def error(self, output: Tensor) -> Tensor:
        """(B,) float32."""
        return self.weight * matching_error(output, self.target)

    def distance(self, output: Tensor) -> Tensor:
        """To the reference's answer, (B,) float32; 0 without a reference."""
        return zeros_like(self.weight) if self.reference is None else self.weight * matching_error(output, self.reference)

    @property
    def ref_error(self) -> Tensor:
        """The reference's error, (B,); 0 without a reference."""
        return zeros_like(self.weight) if self.reference is None else self.error(self.reference)

    def residual(self, output: Tensor) -> Tensor:
        """What the error's gradient by the output is proportional to, (B, *D)."""
        return self.weight.reshape(-1, *[1] * (output.ndim - 1)) * (output - self.target)


class Noising:
    """Noises latents; equal places get equal noise and timesteps, so a pair shares its own."""

    def __init__(self, run, policy: Policy):
        self.args, self.forward = run.args, ForwardProcess(policy.scheduler)
        self.scheme = run.args.timestep_scheme or ("logit_normal" if self.forward.is_flow else "uniform")

    def __call__(self, x0: Tensor, places: list[Position], condition: Condition) -> Noised:
        return next(self.draws(x0, places, condition, 1))

    def draws(self, x0: Tensor, places: list[Position], condition: Condition, number: int) -> Iterator[Noised]:
        """`number` times, at timesteps in equal strata."""
        for x_t, t, noise in self.forward.noised(x0, [place.seed for place in places], number, scheme=self.scheme):
            yield self.at(x0, x_t, t, noise, condition)

    def at(self, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor, condition: Condition) -> Noised:
        """The same for noise that is given."""
        weight = self.forward.error_weight(t, self.args.error_weighting).float().to(x0.device)
        return Noised(x_t, t, condition, self.forward.target(x0, noise, t).float(), weight)


def predict(run, policy: Policy, side: Noised) -> Tensor:
    """The model's answer, (B, *D) float32."""
    with run.accelerator.autocast():
        return policy.predict(side.x_t, side.t, side.condition).float()


def predict_together(run, policy: Policy, sides: Sequence[Noised]) -> Sequence[Tensor]:
    """The model's answers to several sides, winners and losers, say, in one forward pass of all their rows."""
    x_t, t = (cat([getattr(side, name) for side in sides]) for name in ("x_t", "t"))
    with run.accelerator.autocast():
        output = policy.predict(x_t, t, Condition.cat([side.condition for side in sides]))
    return output.float().split([len(side.t) for side in sides])
