r"""Adjoint Matching: reward fine-tuning as optimal control, solved by regression (https://arxiv.org/abs/2409.08861).

The sampler is an SDE that a control u may steer at the price of its energy. For a sampler that forgets its initial noise (a memoryless
one), the cheapest control that earns the reward makes the samples follow the tilted distribution
$p^*(x) \propto p_{base}(x)\, e^{\lambda r(x)}$. The control is learned without a gradient through the chain: along each trajectory the
reward's gradient is pulled back through the pretrained model, and the fine-tuned one is regressed on what arrives.

Written for one Gaussian step $x_{k+1} \sim \mathcal N(\mu(x_k), s_k^2 I)$, so that it holds for any sampler and any parametrisation:

$$ \max_\theta\; \mathbb E\,[\lambda\, r(x_K)] - \mathrm{KL}(\pi_\theta \| \pi_{base}), \qquad
\mathrm{KL} = \mathbb E \sum_k \frac{\|\mu_\theta(x_k) - \mu_{base}(x_k)\|^2}{2 s_k^2} $$

$$ a_K = -\lambda \nabla r(x_K), \qquad a_k = \Big(\frac{\partial \mu_{base}}{\partial x}(x_k)\Big)^{\!\top} a_{k+1}, \qquad
L = \sum_k w_k \Big\| \frac{\mu_\theta(x_k) - \mathrm{sg}\,\mu_{base}(x_k)}{s_k} + s_k\, \mathrm{sg}(a_{k+1}) \Big\|^2 $$

The first term under the norm is the step's control, $u_k = (\mu_\theta - \mu_{base})/s_k$; the adjoint is the lean one, which leaves out what
vanishes in the mean at the optimum. With $w_k = 1$, half the sum of the squared controls is the KL in nats.

The unit of $\lambda$ (`reward_scale`) is nats per unit of reward: the optimum pays up to $\lambda$ nats of KL for one more unit of
reward, whatever the size of the latents. It is 1/beta of KL-regularised RL, and a reward whose gradients are a tenth wants ten times as much.

Which chains are memoryless: for flow matching `memoryless`, the ancestral kernel, whatever the grid; for diffusion DDIM with eta = 1, up
to the signal that its noise table leaves at the last timestep (Stable Diffusion's: a correlation of 0.04 to 0.07 of noise and sample,
which costs that squared of the tilt). Afterwards one samples along the ODE, or with the same SDE: their marginals agree.

Where this differs, and why:

* Step k is paired with $a_{k+1}$. The paper's algorithm and the official code (microsoft/soc-fine-tuning-sd, 489f904) pair it with $a_k$, which is the
  same in continuous time. For Gaussian data and a linear reward $a_{k+1}$ is exact for any number of steps; $a_k$ misses 7% of the tilt at 40
  steps and 32% at 10.
* The paper's kernel is Euler-Maruyama with offsets: `memoryless_em`. It has a bias of O(1/K) in its samples, which the ancestral one has not.
* The loss is the paper's times the step's length: $\|u\|^2$ there is a rate, here its integral. Their threshold $1.6\,\lambda^2$ for dropping
  outliers is $1.6\,\lambda^2 / K$ here.
* The last step has no noise, so no control: as in the paper it is the pretrained model's and counts as a part of the reward.
* Steps with next to no noise are not trained. The control divides by the noise: where a schedule ends just above 0 (diffusers' flow
  schedules end at 0.001 before the last step), one such step would outweigh all others. The paper's uniform grid has none.
* The official code drops the losses above the 90% quantile, by construction a tenth; here a threshold is an option, and the share
  that it drops is logged. Dropped terms are masked: a loss that is clamped keeps its value and loses its gradient, and so would a batch.

Logged: `residual`, the loss over what it is for the pretrained model, 1 at first; it falls to the part of the adjoint that is noise given
the state. `kl`, nats of path KL at the trained steps. `gradient`, the mean norm of the reward's gradient in the latents. `masked`, the
share of (sample, step) terms that were dropped.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..transition import sum_per_sample


def terminal_adjoint(gradient: Tensor, reward_scale: float) -> Tensor:
    r"""$a_K = -\lambda \nabla r$, (B, *D) float32 at least, from the gradient of each sample's own reward.

    Raises:
        ValueError: the gradient is NaN or infinite somewhere.
    """
    if not torch.isfinite(gradient).all():
        raise ValueError("The reward's gradient is NaN or infinite: decode and score in float32, or leave such samples out with a reward that is NaN.")
    return -reward_scale * gradient.to(torch.promote_types(gradient.dtype, torch.float32))


def lean_adjoints(states: Sequence[Tensor], base_mean: Callable[[int, Tensor], Tensor], terminal: Tensor, *, first: int = 0) -> dict[int, Tensor]:
    r"""What each step is matched with: step k's entry is $a_{k+1}$, (B, *D), for k from K - 1 down to `first`.

    One vector-Jacobian product of the pretrained model a step, in the memory of one step. For the pairing of the paper's algorithm
    (a comparison), take step k's from entry k - 1.

    Args:
        states: x_0 to x_K, (B, *D) each, of the fine-tuned model's trajectory; only x_{first+1} to x_{K-1} are looked at.
        base_mean: (k, x) -> the mean of the pretrained model's step k at x, differentiable in x. The SDE's mean, not the ODE's step.
        terminal: a_K.
    """
    last = len(states) - 2
    adjoints = {last: terminal}
    for k in range(last, first, -1):
        adjoints[k - 1] = pulled_back(partial(base_mean, k), states[k], adjoints[k])
    return adjoints


def pulled_back(function: Callable[[Tensor], Tensor], x: Tensor, adjoint: Tensor) -> Tensor:
    """(d function / dx)^T adjoint, (B, *D) in the adjoint's dtype.

    On the way each sample's adjoint is scaled to 1, for the product is linear and half precision would overflow.
    """
    size = adjoint.flatten(1).abs().amax(1).reshape(-1, *[1] * (adjoint.ndim - 1))
    size = torch.where(size > 0, size, 1.0)
    x = x.detach().to(adjoint.dtype).requires_grad_()
    with torch.enable_grad():
        y = function(x)
    (gradient,) = torch.autograd.grad(y, x, (adjoint / size).to(y.dtype))
    return gradient * size


def control(mean: Tensor, base_mean: Tensor, std: Tensor) -> Tensor:
    r"""$u = (\mu_\theta - \mu_{base}) / s$, (B, *D): half its squared norm is the step's KL in nats.

    Raises:
        ValueError: the step has no noise, so it cannot be controlled.
    """
    if bool((std <= 0).any()):
        raise ValueError("A step without noise (std is 0) has no control: match only the stochastic ones.")
    return (mean - base_mean.detach()) / std


def adjoint_matching_loss(mean: Tensor, base_mean: Tensor, std: Tensor, adjoint: Tensor, *, weight: float = 1.0, per_dim: int = 1) -> Tensor:
    """The loss of one step, (B,).

    Args:
        mean: (B, *D), the fine-tuned step's, with gradient.
        base_mean: (B, *D), the pretrained step's at the same state.
        std: the kernels' common standard deviation, broadcastable.
        adjoint: (B, *D), a_{k+1}.
        weight: w_k.
        per_dim: number of dimensions for the mean over them; 1 for the paper's sum.
    """
    residual = control(mean, base_mean, std) + std * adjoint.detach()
    return weight * sum_per_sample(residual.square()) / per_dim


def within(loss: Tensor, threshold: float | None) -> Tensor:
    """(B,) bool: which losses count. An outlier's term is left out as a whole."""
    return torch.ones_like(loss, dtype=torch.bool) if threshold is None else loss.detach() <= threshold


def loss_threshold(loss_clip: float | None, reward_scale: float, num_steps: int) -> float | None:
    r"""$c\,\lambda^2 / K$, from the paper's c (1.6, for ImageReward): its losses are K times ours."""
    return None if loss_clip is None else loss_clip * reward_scale**2 / num_steps


@torch.no_grad()
def matching_diagnostics(mean: Tensor, base_mean: Tensor, std: Tensor, adjoint: Tensor, counts: Tensor) -> dict[str, float]:
    """Of one step, means over its samples: `loss`, the same `uncontrolled`, `kl` in nats, and the share `masked`, where `counts` (B,) is False."""
    u, pull = control(mean, base_mean, std), std * adjoint
    squares = {"loss": sum_per_sample((u + pull).square()), "uncontrolled": sum_per_sample(pull.square()), "kl": sum_per_sample(u.square()) / 2}
    return {**{name: value.mean().item() for name, value in squares.items()}, "masked": 1 - counts.float().mean().item()}


def summary(steps: Sequence[dict[str, float]], num_batches: int) -> dict[str, float]:
    """`residual`, `kl` and `masked` of all diagnosed steps of `num_batches` batches of trajectories."""
    total = {name: sum(step[name] for step in steps) for name in ("loss", "uncontrolled", "kl", "masked")}
    residual = total["loss"] / total["uncontrolled"] if total["uncontrolled"] > 0 else 0.0
    return {"residual": residual, "kl": total["kl"] / num_batches, "masked": total["masked"] / len(steps)}


def matched_steps(stochastic: Sequence[int], last: int, others: int, generator: random.Random) -> list[int]:
    """The `last` of the stochastic steps, where the adjoint is largest, and that many `others` at random, in order.

    The paper trains 10 and 10 of 40.
    """
    number = min(last, len(stochastic))
    early, late = list(stochastic[: len(stochastic) - number]), list(stochastic[len(stochastic) - number :])
    return sorted(generator.sample(early, min(others, len(early)))) + late


def smoothed_gradient(gradients: Tensor, quantile: float = 0.85) -> Tensor:
    """One gradient (B, *D) from those at S slightly noised copies, (S, B, *D): their mean, none longer than that quantile of their
    norms. Of the official code (20 copies, noise of std 0.02): rewards that are networks have gradients that flicker."""
    norms = gradients.flatten(2).norm(dim=2)
    scale = (norms.quantile(quantile, dim=0) / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp(max=1)
    return (gradients * scale.reshape(*scale.shape, *[1] * (gradients.ndim - 2))).mean(0)
