r"""Reward and energy guidance in one form: training-free guidance (TFG, https://arxiv.org/abs/2409.15761), with presets.

A sampler is steered towards a higher s by gradients at its own states. Methods differ in six knobs: how far to follow the gradient
with respect to x_t through the denoiser (variance guidance), how far and how often with respect to the clean estimate alone (mean
guidance), over how many noisy copies of it s is averaged, how often a step is repeated, and the schedules of the strengths. A target tilted
by s needs the score of $h_t$, and every method but the noise-aware one puts s of the clean estimate in its place:

$$ p^*(x) \propto p(x)\, e^{\lambda s(x)}, \qquad \nabla \log p^*_t = \nabla \log p_t + \nabla \log h_t, \qquad
h_t(x_t) = \mathbb E\big[e^{\lambda s(x_0)} \mid x_t\big] \approx e^{\lambda s(\hat x_0(x_t))} $$

States are $x_t = \alpha x_0 + \sigma\epsilon$, for flow matching with $\alpha = 1 - \sigma$. A score g enters exactly, in any parametrisation,
through what it does to the clean estimate at a fixed state:

| $\Delta\hat x_0$ | $\Delta\hat\epsilon$ | $\Delta v$ (diffusion) | $\Delta v$ (flow) |
|---|---|---|---|
| $\sigma^2 g/\alpha$ | $-\sigma g$ | $-\sigma g/\alpha$ | $-\sigma g/(1-\sigma)$ |

With $s = \sigma/(\alpha+\sigma)$ this is the velocity schedule $\lambda(s) = s/(1-s)$ of Feng et al. (https://arxiv.org/abs/2502.02150), whose other
schedules are here too; their v <- v + g grad s, with time rising to the data, is v <- v - lambda grad s.

The plug-in is biased, so no preset is exact: on N(0.7, 0.6^2) tilted by -(x - 0.2)^2 the target has mean 0.491 and deviation 0.458, the
exact h_t arrives there within O(1/K) (0.491 and 0.456 in K = 400 Euler steps), the plug-in at 0.415 and 0.417. A reward that
knows noise (`classifier`) or a correction by particles is asymptotically exact.

Sources of the presets, and what differs: `classifier` https://arxiv.org/abs/2105.05233 and `glide_clip` https://arxiv.org/abs/2112.10741 (the
score form, which holds for deterministic solvers); `clip_guided` is the community pipeline of diffusers, without cutouts; `energy`, the plug-in as
a score; `dps` https://arxiv.org/abs/2209.14687; `lgd_mc` https://proceedings.mlr.press/v202/song23k.html; `freedom` https://arxiv.org/abs/2303.09833 and
`mpgd` https://arxiv.org/abs/2311.16424 (as its Algorithm 1, the clean estimate moves and the predicted noise stays) scale by the guidance of the
classifier-free kind over the whole batch, here by the noise level and each sample by itself; `universal` https://arxiv.org/abs/2302.07121; `tfg`;
`flowchef` https://arxiv.org/abs/2412.00100; `flow` (Feng et al.).

Norms are of each sample by itself, so that results do not depend on the batch. The `dps` norm divides by twice the root of |s|: for
s = -|y - A x0|^2 that is the gradient of -|y - A x0|.

Against official code, TFG's (f8d17f3) and its versions of others: it draws one set of noise copies for all iterations of a step, here each
iteration draws anew; its `dps` divides by |log p| and its `lgd` once more by the number of draws, here both are the papers' (the gradient of a
norm, of a log-mean-exp). FreeDoM repeats the steps from 30% to 60% of the run three times and those up to 70% not; `freedom` repeats all of its window.

Returned beside the samples: `rewards`, of the finished samples; `guided_values`, s of the estimate before each guided step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks.ranges import Count, NonNegative, Probability, check_fields

NORMS = ("none", "unit", "rms", "dps")
ENTRIES = ("output", "state", "renoised")
VELOCITY_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda s: 1.0,
    "linear": lambda s: s,
    "cosine": lambda s: math.sin(math.pi * s / 2),
    "exponential": lambda s: math.exp(-(1 - s)),
    "score": lambda s: s / (1 - s),
    "score_squared": lambda s: (s / (1 - s)) ** 2,
}
STEP_SCHEDULES = ("constant", "increase", "decrease")
Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Guidance:
    """How to guide. Strengths are multiplied with the caller's scale.

    Attributes:
        noisy: strength of a noise-aware reward's score, the gradient with respect to x_t without the denoiser.
        variance: of the gradient with respect to x_t through the denoiser (TFG's rho).
        mean: of the gradient with respect to the clean estimate (TFG's mu), `iterations` times per step.
        draws, smoothing: log-mean-exp over so many copies of the clean estimate with noise of smoothing * sigma / sqrt(alpha^2 + sigma^2).
        recurrence: how often each guided step is made, a predictor with its corrector; between the times the state is noised again.
        norm: of each sample's gradient: `none`; `unit`, length 1; `rms`, root mean square sigma; `dps`, over twice the root of |s|.
        variance_entry: `output`, as a velocity with a schedule of `VELOCITY_SCHEDULES`, `score` being the exact conversion; `state`, added after
            the step, with a schedule of `STEP_SCHEDULES` of mean 1 over the guided steps; `renoised`, alpha' / alpha of that (TFG).
        mean_entry: `output`, the model's output is that of the shifted clean estimate; `renoised`, alpha' of the shift is added after
            the step (TFG); `state`, all of it (FlowChef). The schedule is of `STEP_SCHEDULES`.
        blend: evaluate s at sigma x0 + (1 - sigma) x_t, as CLIP guidance does.
        start, stop: the steps guided, as fractions of the run.

    Raises:
        ValueError: an unknown name, a count below 1, an empty window, or no strength at all.
    """

    noisy: float = 0.0
    variance: float = 0.0
    mean: float = 0.0
    iterations: Count = 1
    draws: Count = 1
    smoothing: NonNegative = 0.0
    recurrence: Count = 1
    norm: str = "none"
    variance_entry: str = "output"
    variance_schedule: str = "score"
    mean_entry: str = "output"
    mean_schedule: str = "constant"
    blend: bool = False
    start: Probability = 0.0
    stop: Probability = 1.0

    def __post_init__(self):
        check_fields(self)
        velocities = VELOCITY_SCHEDULES if self.variance_entry == "output" else STEP_SCHEDULES
        for name, known in {
            "norm": NORMS, "variance_entry": ENTRIES, "mean_entry": ENTRIES, "variance_schedule": velocities, "mean_schedule": STEP_SCHEDULES,
        }.items():  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(f"Unknown {name} {getattr(self, name)!r}; choose one of {', '.join(known)}.")
        if self.start >= self.stop:
            raise ValueError(f"The window needs 0 <= start < stop <= 1, got {self.start} to {self.stop}.")
        if not (self.noisy or self.variance or self.mean):
            raise ValueError("Nothing guides: give noisy, variance or mean a strength.")
        if self.noisy and (self.variance or self.mean):
            raise ValueError("A noise-aware reward (noisy) reads x_t, the others read the clean estimate: use one kind.")


PRESETS = {
    "classifier": Guidance(noisy=1.0),
    "glide_clip": Guidance(noisy=3.0),
    "clip_guided": Guidance(variance=1.0, blend=True),
    "energy": Guidance(variance=1.0),
    "dps": Guidance(variance=1.0, norm="dps", variance_entry="state", variance_schedule="constant"),
    "lgd_mc": Guidance(variance=1.0, draws=4, smoothing=1.0, variance_entry="state", variance_schedule="constant"),
    "freedom": Guidance(variance=0.2, norm="rms", recurrence=3, start=0.3, stop=0.7, variance_entry="state", variance_schedule="constant"),
    "mpgd": Guidance(mean=1.0, norm="rms", mean_entry="renoised"),
    "universal": Guidance(variance=1.0, mean=1.0, iterations=3, recurrence=2),
    "tfg": Guidance(
        variance=1.0, mean=1.0, draws=4, smoothing=0.01, variance_entry="renoised", variance_schedule="increase",
        mean_entry="renoised", mean_schedule="increase",
    ),
    "flowchef": Guidance(mean=1.0, mean_entry="state"),
    "flow": Guidance(variance=1.0, variance_schedule="linear"),
}  # fmt: skip


def preset(name: str, **overrides) -> Guidance:
    """A preset by name, with some of its fields replaced.

    Raises:
        ValueError: an unknown preset, or a value that `Guidance` refuses.
        TypeError: an unknown field.
    """
    if name not in PRESETS:
        raise ValueError(f"Unknown preset {name!r}; choose one of {', '.join(PRESETS)}.")
    return replace(PRESETS[name], **overrides)


class Level(NamedTuple):
    """A state is alpha x0 + sigma noise."""

    alpha: float
    sigma: float


# --- conversions -------------------------------------------------------------------------------------------------------


def clean_estimate(output: Tensor, x_t: Tensor, level: Level, prediction: str) -> Tensor:
    """The clean sample (B, *D) that the model's output implies; `prediction` is `epsilon`, `v_prediction`, `sample` or `flow`."""
    alpha, sigma = level
    if prediction == "flow":
        return x_t - sigma * output
    if prediction == "epsilon":
        return (x_t - sigma * output) / alpha
    return output if prediction == "sample" else alpha * x_t - sigma * output


def output_change(clean_change: Tensor, level: Level, prediction: str) -> Tensor:
    """What to add to the model's output so that its clean estimate moves by `clean_change` (B, *D), the state standing still.

    Nothing at a level without noise (some schedules end with a step from 0 to 0): there the state is the clean estimate, whatever the output.
    """
    if prediction == "sample":
        return clean_change
    if level.sigma == 0:
        return torch.zeros_like(clean_change)
    return -clean_change * (level.alpha / level.sigma if prediction == "epsilon" else 1 / level.sigma)


def clean_change(gradient: Tensor, level: Level, schedule: str = "score") -> Tensor:
    """The move of the clean estimate that a gradient with respect to x_t stands for: sigma^2 / alpha of a score; another schedule of
    the velocity has that of its own. Infinite where alpha is 0, for `score`."""
    alpha, sigma = level
    if schedule == "score":
        return gradient * (sigma**2 / alpha)
    return gradient * (sigma * VELOCITY_SCHEDULES[schedule](sigma / (alpha + sigma)))


def renoised(x_next: Tensor, level: Level, level_next: Level, noise: Tensor) -> Tensor:
    """From the state after a step back to the one before, by the forward process: a x' + sqrt(sigma^2 - a^2 sigma'^2) noise with
    a = alpha / alpha'."""
    a = level.alpha / level_next.alpha
    return a * x_next + math.sqrt(max(0.0, level.sigma**2 - (a * level_next.sigma) ** 2)) * noise


# --- the engine --------------------------------------------------------------------------------------------------------


def step_weights(levels: list[Level], schedule: str, guided: Sequence[int]) -> list[float]:
    """Weights of the steps, (K,): of mean 1 over those that are `guided`, 0 elsewhere. `levels` are K + 1, from noise to data.

    `increase` goes with $(\\alpha_k/\\alpha_{k+1})^2$, `decrease` with what that lacks to 1, as in the official code of TFG (f8d17f3).
    """
    kept = [(a.alpha / b.alpha) ** 2 for a, b in zip(levels, levels[1:])]
    raw = {"constant": [1.0] * len(kept), "increase": kept, "decrease": [1 - ratio for ratio in kept]}[schedule]
    total = sum(raw[k] for k in guided)
    return [weight * len(guided) / total if k in guided and total > 0 else 0.0 for k, weight in enumerate(raw)]


def normalised(gradient: Tensor, norm: str, value: Tensor, sigma: float) -> Tensor:
    """Each sample's gradient (B, *D) by its norm; `value` (B,) is s there."""
    if norm == "none":
        return gradient
    shape = [-1] + [1] * (gradient.ndim - 1)
    if norm == "dps":
        return gradient / (2 * value.abs().clamp(min=1e-12).sqrt()).reshape(shape)
    length = gradient.flatten(1).norm(dim=1).clamp(min=1e-12).reshape(shape)
    return gradient / length * (1.0 if norm == "unit" else sigma * math.sqrt(gradient[0].numel()))


def smoothed(evaluate: Evaluate, x: Tensor, noises: list[Tensor], scale: float) -> tuple[Tensor, Tensor]:
    r"""$\frac1\lambda\log\frac1n\sum_i e^{\lambda s(x + \delta_i)}$ (B,) and its gradient (B, *D), with one copy in memory at a time.

    Args:
        evaluate: s (B,) and its gradient at (B, *D).
        noises: n of (B, *D); none of them is s itself.
        scale: lambda, not 0.
    """
    if not noises:
        return evaluate(x)
    values, gradients = (torch.stack(parts) for parts in zip(*(evaluate(x + noise) for noise in noises)))
    weights = (scale * values).softmax(0).reshape(*values.shape, *[1] * (x.ndim - 1))
    value = ((scale * values).logsumexp(0) - math.log(len(noises))) / scale
    return value, (weights.to(gradients.dtype) * gradients).sum(0)


class Shift(NamedTuple):
    """What guidance does to a step: the clean estimate's move (B, *D), to go through the model's output; the addition to the state
    after the step (B, *D); and s (B,) before."""

    clean: Tensor
    state: Tensor
    value: Tensor


def guide(
    guidance: Guidance,
    evaluate: Evaluate,
    x_t: Tensor,
    x0: Tensor,
    levels: tuple[Level, Level],
    *,
    scale: float,
    weights: tuple[float, float] = (1.0, 1.0),
    pull_back: Callable[[Tensor], Tensor] | None = None,
    draw: Callable[[], Tensor] | None = None,
) -> Shift:
    """One guided step.

    Args:
        evaluate: s (B,) and its gradient at clean samples (B, *D); at x_t for a noise-aware reward.
        x_t, x0: state and the model's clean estimate (B, *D), without graphs.
        levels: of this state and the next.
        scale: lambda, the strength of the tilt.
        weights: of this step, for variance and mean guidance (`step_weights`).
        pull_back: the vector-Jacobian product of x_t -> x0.
        draw: standard normal (B, *D), for smoothing.
    """
    level, level_next = levels
    clean, state = torch.zeros_like(x0), torch.zeros_like(x0)
    if guidance.noisy:
        value, gradient = evaluate(x_t)
        gradient = normalised(gradient, guidance.norm, value, level.sigma)
        return Shift(scale * guidance.noisy * clean_change(gradient, level, guidance.variance_schedule), state, value)

    def gradient_at(x: Tensor) -> tuple[Tensor, Tensor]:
        spread = guidance.smoothing * level.sigma / math.hypot(*level)
        noises = [spread * draw() for _ in range(guidance.draws)] if spread > 0 else []
        return smoothed(evaluate, x, noises, scale)

    seen = level.sigma if guidance.blend else 1.0
    value, gradient = gradient_at(seen * x0 + (1 - seen) * x_t)
    if guidance.variance:
        through = normalised(pull_back(seen * gradient) + (1 - seen) * gradient, guidance.norm, value, level.sigma)
        if guidance.variance_entry != "output":
            factor = level_next.alpha / level.alpha if guidance.variance_entry == "renoised" else 1.0
            state = state + factor * scale * guidance.variance * weights[0] * through
        else:
            clean = clean + scale * guidance.variance * clean_change(through, level, guidance.variance_schedule)
    if guidance.mean:
        moved, at, there = torch.zeros_like(x0), value, gradient
        for iteration in range(guidance.iterations):
            if iteration > 0:
                at, there = gradient_at(x0 + moved)
            moved = moved + scale * guidance.mean * weights[1] * normalised(there, guidance.norm, at, level.sigma)
        factor = {"output": 0.0, "state": 1.0, "renoised": level_next.alpha}[guidance.mean_entry]
        clean, state = (clean + moved, state) if guidance.mean_entry == "output" else (clean, state + factor * moved)
    return Shift(clean, state, value)
