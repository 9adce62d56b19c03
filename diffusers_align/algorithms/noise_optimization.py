r"""Noise optimisation: gradient ascent on the reward with respect to the noise that a sampler starts from; the weights stand still.

A deterministic sampler is a map g from noise to images. Its input is moved uphill through the whole chain, and held where standard
normal noise lies, since the model was trained on nothing else:

$$ \max_z\; \lambda\, r(g(z)) - \rho\, K(z), \qquad K(z) = \tfrac12\lVert z\rVert^2 - (D - 1)\log\lVert z\rVert $$

$e^{-K}$ is the density of the norm of D standard normal numbers up to a constant (the chi distribution), largest at $\lVert z\rVert = \sqrt{D - 1}$.

Three optimisers, each with the settings of a paper (`SETTINGS`):

* `sgd`: ReNO (https://arxiv.org/abs/2406.04312), Nesterov momentum 0.9, rate 5, gradients clipped to norm 0.1, 50 iterations, rho = 0.01, the best
  iterate returned. Meant for samplers of one to four steps. Its rewards are weighted sums: see `reward_scale` and sums of rewards.
* `adam`: DNO (https://arxiv.org/abs/2405.18881), rate 0.01, gradients clipped to norm 1, 100 iterations, and the regulariser `concentration`, rho = 1 as
  in its authors' example (their default is 0). DNO moves the noise of all steps of a stochastic sampler, with weight decay; here it is the initial noise
  alone, as in their code at eta = 0 (neither compared), without decay, which the regulariser makes needless.
* `lbfgs`: D-Flow (https://arxiv.org/abs/2402.14017), rate 1, history 100, strong Wolfe line search, 20 iterations, no clipping, and no regulariser: the
  gradient through the flow is shaped by it, which regularises by itself. There is no official code. An iteration costs an evaluation or more.

Norms, clipping and the best iterate are of each sample by itself, so that results do not depend on the batch.

Returned: `reward_history`, r of every iterate from the stock sample on; `rewards`, the best; `noise`, where it was found; `noise_norm` and `noise_distance`
from the start, over $\sqrt D$: a norm far from 1 is noise that the model does not know.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..checks.ranges import CountOrNone, NonNegative, Positive, PositiveOrInfinite, check_fields

Evaluate = Callable[[Tensor, bool], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class NoiseOptimization:
    """How to climb.

    Attributes:
        optimizer: `sgd`, `adam` or `lbfgs`.
        num_iterations: updates; 0 leaves the noise as it is.
        learning_rate: of the optimiser.
        max_grad_norm: to which each sample's gradient is clipped; infinite for none.
        regularizer: `norm` (K above) or `concentration`.
        regularization: rho, its weight.

    Raises:
        ValueError: an unknown name, or a number out of range.
    """

    optimizer: str
    num_iterations: CountOrNone
    learning_rate: Positive
    max_grad_norm: PositiveOrInfinite = math.inf
    regularizer: str = "norm"
    regularization: NonNegative = 0.0

    def __post_init__(self):
        check_fields(self)
        for name, known in {"optimizer": OPTIMIZERS, "regularizer": REGULARIZERS}.items():
            if getattr(self, name) not in known:
                raise ValueError(f"Unknown {name} {getattr(self, name)!r}; choose one of {', '.join(known)}.")
        if self.optimizer == "lbfgs" and self.max_grad_norm < math.inf:
            raise ValueError("lbfgs searches along the true gradient, which clipping would bend: leave max_grad_norm out.")


# --- regularisers ------------------------------------------------------------------------------------------------------


def norm_regularizer(noise: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """K (B,) of noise (B, *D), in float32 at least: half precision overflows. ReNO, equation 9."""
    norm = noise.flatten(1).to(torch.promote_types(noise.dtype, torch.float32)).norm(dim=1)
    return norm.square() / 2 - (noise[0].numel() - 1) * norm.log()


def concentration_regularizer(noise: Tensor, generator: torch.Generator | None = None, *, block: int = 4, permutations: int = 100) -> Tensor:
    r"""$-\log p_1 - \log p_2$ (B,) of noise (B, *D), averaged over random orders, plus that in the given order. DNO, section 3.

    In each order the elements are m blocks $z_i$ of k numbers, whose mean and second moments standard normal noise leaves near 0 and I:

    $$ p_1 = \min(1, 2e^{-m\lVert\frac1m\sum z_i\rVert^2/2k}), \quad
    p_2 = \min(1, 2e^{-m\max(\sqrt{1 + M} - 1 - \sqrt{k/m},\, 0)^2/2}), \quad M = \lVert\tfrac1m\sum z_iz_i^\top - I\rVert_2 $$

    Args:
        generator: of the orders.
        block, permutations: k and their number, the official code's. Elements beyond a multiple of k are left out of an order.
    """
    flat = noise.flatten(1).to(torch.promote_types(noise.dtype, torch.float32))
    number, eye = flat.shape[1] // block, torch.eye(block, dtype=flat.dtype, device=flat.device)
    orders = [torch.arange(flat.shape[1]), *(torch.randperm(flat.shape[1], generator=generator) for _ in range(permutations))]
    blocks = [flat[:, order[: number * block].to(flat.device)].reshape(len(flat), number, block) for order in orders]
    mean = torch.stack([z.mean(1).square().sum(1) for z in blocks])
    excess = torch.linalg.matrix_norm(torch.stack([z.mT @ z for z in blocks]) / number - eye, ord=2)
    spread = ((1 + excess).sqrt() - 1 - math.sqrt(block / number)).clamp(min=0).square()
    surprise = (number * mean / (2 * block) - math.log(2)).clamp(min=0) + (number * spread / 2 - math.log(2)).clamp(min=0)
    return surprise[0] + surprise[1:].mean(0)


def clipped(gradient: Tensor, max_norm: float) -> Tensor:
    """Each sample's gradient (B, *D), its norm at most `max_norm`."""
    norm = gradient.flatten(1).norm(dim=1).clamp(min=1e-12)
    return gradient * (max_norm / norm).clamp(max=1).reshape(-1, *[1] * (gradient.ndim - 1))


REGULARIZERS = {"norm": norm_regularizer, "concentration": concentration_regularizer}
OPTIMIZERS: dict[str, Callable[[Tensor, float], torch.optim.Optimizer]] = {
    "sgd": lambda z, rate: torch.optim.SGD([z], rate, momentum=0.9, nesterov=True),
    "adam": lambda z, rate: torch.optim.Adam([z], rate),
    "lbfgs": lambda z, rate: torch.optim.LBFGS([z], rate, max_iter=1, history_size=100, line_search_fn="strong_wolfe"),
}
SETTINGS = {
    "sgd": NoiseOptimization("sgd", 50, 5.0, max_grad_norm=0.1, regularization=0.01),
    "adam": NoiseOptimization("adam", 100, 0.01, max_grad_norm=1.0, regularizer="concentration", regularization=1.0),
    "lbfgs": NoiseOptimization("lbfgs", 20, 1.0),
}


def settings(optimizer: str, **overrides: Any) -> NoiseOptimization:
    """The settings of an optimiser's paper, with other values for some.

    Raises:
        ValueError: an unknown optimiser, or a value out of range.
    """
    if optimizer not in SETTINGS:
        raise ValueError(f"Unknown optimizer {optimizer!r}; choose one of {', '.join(SETTINGS)}.")
    return replace(SETTINGS[optimizer], **overrides)


# --- the ascent --------------------------------------------------------------------------------------------------------


@dataclass
class Ascent:
    """Where an ascent has come.

    Attributes:
        noise: (B, *D), the best iterate of each sample.
        rewards: (B,), of it; -inf where no reward was finite.
        history: (B,) for each iterate, NaN from where a sample stopped.
        running: (B,) bool, whose rewards and gradients were finite so far.
    """

    noise: Tensor
    rewards: Tensor
    history: list[Tensor]
    running: Tensor


def ascend(
    evaluate: Evaluate,
    start: Tensor,
    chosen: NoiseOptimization,
    *,
    reward_scale: float = 1.0,
    on_better: Callable[[Tensor], None] = lambda better: None,
    on_iterate: Callable[[], None] = lambda: None,
) -> Ascent:
    """Climb from `start` (B, *D), `num_iterations` updates.

    Args:
        evaluate: at noise (B, *D) the rewards (B,) and their gradient (B, *D), which need not be there if the second argument is False.
        reward_scale: lambda.
        on_better: gets (B,) bool after an evaluation, which of its samples are the best so far.
        on_iterate: called after each update.

    A sample whose reward or gradient is not finite stops there, with its best so far.

    Raises:
        ValueError: several samples at once with `lbfgs`, whose line search would couple them.
    """
    if chosen.optimizer == "lbfgs" and len(start) > 1:
        raise ValueError("lbfgs searches along one line for all it is given: climb with one sample at a time.")
    z = start.detach().clone().requires_grad_()
    optimizer = OPTIMIZERS[chosen.optimizer](z, chosen.learning_rate)
    climb = _Climb(evaluate, chosen, reward_scale, on_better, z)
    for iteration in range(chosen.num_iterations):
        if not bool(climb.found.running.any()):
            break
        climb.begin(iteration)
        try:
            optimizer.step(climb)
        except _Stopped:
            break
        on_iterate()
    climb.end()
    return climb.found


class _Stopped(Exception):
    """No sample can go on."""


class _Climb:
    """The optimiser's closure: the loss at its noise, with the gradient in place."""

    def __init__(self, evaluate: Evaluate, chosen: NoiseOptimization, reward_scale: float, on_better, z: Tensor):
        self.evaluate, self.chosen, self.reward_scale, self.on_better, self.z = evaluate, chosen, reward_scale, on_better, z
        shape, device = (len(z),), z.device
        self.found = Ascent(z.detach().clone(), torch.full(shape, -torch.inf, device=device), [], torch.ones(shape, dtype=torch.bool, device=device))
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def begin(self, iteration: int) -> None:
        self.iteration, self.noted = iteration, False
        self.seen = [entry for entry in self.seen if torch.equal(entry[0], self.z)]

    @torch.no_grad()
    def __call__(self) -> Tensor:
        rewards, gradient = self._at(self.z.detach().clone())
        if not self.noted:
            self.found.history.append(rewards)
            self.noted = True
        if not bool(self.found.running.any()):
            raise _Stopped
        with torch.enable_grad():
            leaf = self.z.detach().requires_grad_()
            # The same orders for all evaluations of an iteration: a line search needs one function.
            penalty = (
                REGULARIZERS[self.chosen.regularizer](leaf, torch.Generator().manual_seed(self.iteration)) if self.chosen.regularization else leaf.sum() * 0
            )
            (pull,) = torch.autograd.grad(penalty.sum(), leaf)
        downhill = clipped(self.chosen.regularization * pull - self.reward_scale * gradient, self.chosen.max_grad_norm)
        self.z.grad = torch.where(_like(self.found.running, downhill), downhill, 0.0)
        loss = self.chosen.regularization * penalty.detach() - self.reward_scale * rewards
        return loss.nan_to_num().sum()

    def _at(self, noise: Tensor, gradient: bool = True) -> tuple[Tensor, Tensor | None]:
        """Rewards and gradient, NaN and 0 where a sample has stopped; once for each noise."""
        for known, rewards, slope in self.seen:
            if torch.equal(known, noise):
                return rewards, slope
        rewards, slope = self.evaluate(noise, gradient)
        finite = rewards.isfinite() & (slope.flatten(1).isfinite().all(1) if gradient else True)
        better = self.found.running & rewards.isfinite() & (rewards > self.found.rewards)
        self.found.running = self.found.running & finite
        rewards = torch.where(self.found.running | better, rewards, torch.nan)
        self.found.rewards = torch.where(better, rewards, self.found.rewards)
        self.found.noise = torch.where(_like(better, noise), noise, self.found.noise)
        self.on_better(better)
        if gradient:
            slope = torch.where(_like(self.found.running, slope), slope, 0.0)
            self.seen.append((noise, rewards, slope))
        return rewards, slope

    @torch.no_grad()
    def end(self) -> None:
        """Evaluate the last iterate, and fill the history of those who stopped."""
        missing = torch.full_like(self.found.rewards, torch.nan)
        if bool(self.found.running.any()):
            self.found.history.append(self._at(self.z.detach().clone(), gradient=False)[0])
        self.found.history += [missing] * (self.chosen.num_iterations + 1 - len(self.found.history))


def _like(mask: Tensor, x: Tensor) -> Tensor:
    return mask.reshape(-1, *[1] * (x.ndim - 1))
