r"""The reverse kernel of one solver step: $p(x_{t-1} \mid x_t, c) = \mathcal N(\mu, \mathrm{std}^2 I)$.

Everything that policy-gradient, preference and control methods need from a sampler is its mean and its standard deviation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def sum_per_sample(x: Tensor) -> Tensor:
    """Sum over all but the batch dimension, accumulated in float64 (float32 where a device has none): (B, *D) -> (B,)."""
    dtype = torch.float32 if x.device.type == "mps" else torch.float64
    return x.flatten(1).sum(1, dtype=dtype)


def standard_normal(shape: tuple[int, ...], generator: torch.Generator | list[torch.Generator] | None, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Noise of a shape (B, *D), bit for bit as diffusers' `randn_tensor` draws it: each sample by its own generator where there are several, on the CPU
    where they are there.

    Raises:
        ValueError: fewer generators than samples, or generators of another device that is not the CPU.
    """
    generators = generator if isinstance(generator, list) else [generator]
    source = generators[0].device if generators[0] is not None else device
    if source.type not in ("cpu", device.type):
        raise ValueError(f"A generator on {source} draws no noise for {device}: make it there, or on the CPU, torch.Generator().")
    source = source if source.type == "cpu" else device
    if len(generators) == 1:
        return torch.randn(shape, generator=generators[0], device=source, dtype=dtype).to(device)
    if len(generators) < shape[0]:
        raise ValueError(f"{shape[0]} samples need as many generators, got {len(generators)}.")
    return torch.cat([torch.randn((1, *shape[1:]), generator=g, device=source, dtype=dtype) for g in generators[: shape[0]]]).to(device)


def _require_same(x: Tensor, mean: Tensor) -> None:
    """One sample for many would be broadcast without a word."""
    if x.shape != mean.shape:
        raise ValueError(f"A state of shape {tuple(x.shape)} is none of this kernel, whose mean has {tuple(mean.shape)}.")


def _summed(terms: Tensor, noisy: Tensor | None) -> Tensor:
    return sum_per_sample(terms if noisy is None else terms.where(noisy, 0.0))


@dataclass(frozen=True)
class GaussianTransition:
    """A batch of diagonal Gaussians over the next state.

    Attributes:
        mean: (B, *D) float32.
        std: (1 or B, 1, ..., 1), or of each element, broadcastable to `mean`, float32. 0 marks what stands still: a deterministic step, or the tokens
            of a condition.
    """

    mean: Tensor
    std: Tensor

    def sample(self, generator: torch.Generator | list[torch.Generator] | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Draw x_{t-1}. `generator` may be a list with one generator a sample; `dtype` is the dtype the noise is drawn in."""
        noise = standard_normal(tuple(self.mean.shape), generator, self.mean.device, dtype or self.mean.dtype)
        return self.mean + self.std * noise

    def select(self, index) -> GaussianTransition:
        """The Gaussians of some of the samples."""
        return GaussianTransition(self.mean[index], self.std if len(self.std) == 1 else self.std[index])

    @staticmethod
    def cat(parts: list[GaussianTransition]) -> GaussianTransition:
        """One batch of the same step's Gaussians of several samples."""
        shared = all(len(p.std) == 1 for p in parts)
        rows = (p.std if len(p.std) > 1 else p.std.expand(len(p.mean), *p.std.shape[1:]) for p in parts)
        return GaussianTransition(torch.cat([p.mean for p in parts]), parts[0].std if shared else torch.cat(list(rows)))

    def log_prob(self, x_prev: Tensor) -> Tensor:
        """Log-density of `x_prev` (B, *D) in nats, (B,): the SUM over D, elementwise in float32 and reduced in float64. Elements that stand still
        (std is 0) contribute nothing.

        Raises:
            ValueError: the step is deterministic (std is 0 all over a sample), so the density does not exist; `x_prev` is of other samples.
        """
        noisy, std = self._noise()
        _require_same(x_prev, self.mean)
        deviation = (x_prev.to(self.mean.dtype) - self.mean) / std
        return _summed(-0.5 * deviation.square() - std.log() - _HALF_LOG_2PI, noisy)

    def kl(self, other: GaussianTransition) -> Tensor:
        r"""$\mathrm{KL}(p \,\|\, q)$ in nats, (B,), closed form, summed over D. `other` is q. Elements that stand still in both contribute nothing.

        Raises:
            ValueError: either step is deterministic, the two are of other samples, or other elements of them stand still.
        """
        (noisy, std), (other_noisy, other_std) = self._noise(), other._noise()
        _require_same(other.mean, self.mean)
        if (noisy is None) != (other_noisy is None) or noisy is not None and bool((noisy != other_noisy).any()):
            raise ValueError("The one step has noise in elements that stand still in the other, so that their divergence is infinite.")
        ratio = (std / other_std).square()
        shift = ((self.mean - other.mean) / other_std).square()
        return _summed(0.5 * (shift + ratio - 1 - ratio.log()), noisy)

    def _noise(self) -> tuple[Tensor | None, Tensor]:
        """Which elements have noise, None where all do; and the standard deviation, 1 in those without."""
        noisy = self.std > 0
        if bool(noisy.all()):
            return None, self.std
        if not bool(noisy.flatten(1).any(1).all()):
            raise ValueError(
                "This step is deterministic (std is 0), so it has no log-probability. Use only the steps where "
                "`scheduler.stochastic_steps` is True, or raise the scheduler's noise (`eta`, `noise_level`)."
            )
        return noisy, self.std.where(noisy, 1.0)
