r"""Particle steering: sequential Monte Carlo on the denoising chain (Feynman-Kac steering, https://arxiv.org/abs/2501.06848; twisted
proposals, TDS, https://arxiv.org/abs/2306.17775).

N particles of one prompt walk the sampler's own stochastic chain. Now and then each is weighed by how good its predicted clean
sample is, and those of little weight are replaced by copies of the others. At the end, weighted particles are samples of the
pretrained model tilted by the reward, whatever the potentials on the way, because the last one pays what is owed:

$$ p^*(x_K) \propto p(x_K)\, e^{\lambda r(x_K)}, \qquad \log w_k = \log w_{k-1} + \log G_k + \log\frac{p(x_{k+1} \mid x_k)}{q(x_{k+1} \mid x_k)},
\qquad \sum_k \log G_k = \lambda r(x_K) $$

Potentials, of rewards $r_k$ of the predicted clean samples: `difference` $\log G_k = \lambda(r_k - r_{k-1})$, `max` $\lambda\max_{s \le k} r_s$,
`add` $\lambda\sum_{s \le k} r_s$. The proposal q is the chain itself (bootstrap) or its kernel shifted by $\mathrm{std}^2\,\nabla\log G$ (twisted).

Weights that are not resampled are carried on, and the evidence $\hat Z = \prod \frac1N\sum w$, one factor a resampling and one at the end, is
unbiased for $\mathbb E_p[e^{\lambda r}]$ with any N, threshold, resampler and proposal. Intermediate potentials only lower its variance.

Against the official code (zacharyhorvitz/Fk-Diffusion-Steering, 9413005): there, weights are thrown away at each step that does not resample, so
that its adaptive mode hardly steers and its `max` and `add` miss the tilt; potentials are exponentiated before they are normalised,
and saturate; a particle's potential is that of the state one step before. Here weights stay logarithmic and are carried,
and the potential is that of the state which is resampled. Against DAS (https://arxiv.org/abs/2501.05803): everything of a particle is gathered.

Reported: `ess`, the effective number of particles of each prompt whenever they are weighed, before resampling; `log_evidence`, the
logarithm of $\hat Z$; `rewards` and `log_weights` of all particles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

POTENTIALS = ("difference", "max", "add")
RESAMPLERS = ("systematic", "stratified", "multinomial")


@dataclass(frozen=True)
class Weights:
    """What N particles of each of P groups have come to be worth; float64.

    Attributes:
        log_weight: (P, N), since the last resampling.
        log_evidence: (P,), of the resamplings so far.
        paid: (P, N), the sum of a particle's log-potentials.
        summary: (P, N), what its potential remembers of its rewards: the last, the largest or the sum.
    """

    log_weight: Tensor
    log_evidence: Tensor
    paid: Tensor
    summary: Tensor


def initial_weights(groups: int, particles: int, device: torch.device | str = "cpu") -> Weights:
    """Equal weights, nothing paid."""
    zeros = torch.zeros(groups, particles, dtype=torch.float64, device=device)
    return Weights(zeros, zeros[:, 0], zeros, torch.full_like(zeros, torch.nan))


def reweight(
    weights: Weights, rewards: Tensor, *, potential: str = "difference", reward_scale: float = 10.0, log_ratio: Tensor | None = None, last: bool = False
) -> Weights:
    """Weigh particles by their rewards.

    Args:
        rewards: (P, N), of the predicted clean samples, or of the samples themselves if `last`. A particle without a reward (NaN)
            gets the weight 0; groups that would have none left keep their weights.
        potential: `difference`, `max` or `add`.
        reward_scale: lambda, 10 in FK steering. The tilt is exp(lambda r).
        log_ratio: (P, N), log p - log q of the proposals since the last weighing.
        last: these are the final samples, so pay exactly what is owed: lambda r in sum.
    """
    rewards = rewards.to(weights.paid)
    scored, r = torch.isfinite(rewards), torch.nan_to_num(rewards)
    before = torch.nan_to_num(weights.summary)
    if potential == "difference":
        summary, increment = r, r - before
    elif potential == "max":
        summary = increment = torch.where(weights.summary.isnan(), r, torch.maximum(before, r))
    elif potential == "add":
        summary = increment = before + r
    else:
        raise ValueError(f"Unknown potential {potential!r}; choose one of {', '.join(POTENTIALS)}.")
    owed = reward_scale * r - weights.paid if last else reward_scale * increment
    carried = weights.log_weight if log_ratio is None else weights.log_weight + log_ratio
    log_weight = torch.where(scored, carried + owed, -torch.inf)
    alive = torch.isfinite(log_weight).any(1, keepdim=True)
    return Weights(
        log_weight=torch.where(alive, log_weight, carried),
        log_evidence=weights.log_evidence,
        paid=torch.where(scored, weights.paid + owed, weights.paid),
        summary=torch.where(scored, summary, weights.summary),
    )


def effective_particles(log_weight: Tensor) -> Tensor:
    """1 / sum of squared normalised weights, (P,): N for equal weights, 1 where one particle has all."""
    return 1 / log_weight.softmax(1).square().sum(1)


def log_evidence(weights: Weights) -> Tensor:
    """log of the evidence's estimate so far, (P,). Its exponential is unbiased, itself is not."""
    return weights.log_evidence + weights.log_weight.logsumexp(1) - math.log(weights.log_weight.shape[1])


def ancestors(log_weight: Tensor, uniforms: Tensor, method: str = "systematic") -> Tensor:
    """Whose copies the particles become, (P, N) indices within their groups; particle i is chosen N w_i times in expectation.

    Args:
        uniforms: (P, N) in [0, 1); `systematic` uses the first of each group.
        method: `systematic` (least variance), `stratified` or `multinomial`.
    """
    number = log_weight.shape[1]
    strata = torch.arange(number, dtype=torch.float64, device=log_weight.device)
    uniforms = uniforms.to(log_weight)
    if method == "systematic":
        positions = (strata + uniforms[:, :1]) / number
    elif method == "stratified":
        positions = (strata + uniforms) / number
    elif method == "multinomial":
        positions = uniforms
    else:
        raise ValueError(f"Unknown resampler {method!r}; choose one of {', '.join(RESAMPLERS)}.")
    cumulative = log_weight.softmax(1).cumsum(1)
    below_one = 1 - torch.finfo(torch.float64).eps
    # right: a particle of weight 0 adds nothing to the sum and is never found.
    return torch.searchsorted(cumulative / cumulative[:, -1:], positions.clamp(max=below_one).contiguous(), right=True).clamp(max=number - 1)


def resample(weights: Weights, uniforms: Tensor, *, method: str = "systematic", ess_threshold: float = 0.5) -> tuple[Weights, Tensor]:
    """Resample the groups whose effective number of particles is below `ess_threshold` N; the others carry their weights on.

    Args:
        ess_threshold: 0.5 as is usual; 1 resamples whenever weights differ.

    Returns:
        The weights, and (P, N) ancestors: whatever belongs to a particle must be gathered by them.
    """
    groups, number = weights.log_weight.shape
    # Equal weights are left alone, whatever their sum rounds to.
    poor = (effective_particles(weights.log_weight) < ess_threshold * number * (1 - 1e-9))[:, None]
    identity = torch.arange(number, device=poor.device).expand(groups, number)
    index = torch.where(poor, ancestors(weights.log_weight, uniforms, method), identity)
    resampled = Weights(
        log_weight=torch.where(poor, 0.0, weights.log_weight),
        log_evidence=torch.where(poor[:, 0], log_evidence(weights), weights.log_evidence),
        paid=weights.paid.gather(1, index),
        summary=weights.summary.gather(1, index),
    )
    return resampled, index


def twist(mean: Tensor, std: Tensor, gradient: Tensor) -> Tensor:
    """The twisted proposal's mean, (B, *D): shifted by std^2 times the gradient of the log-potential at the current state."""
    return mean + std.square() * gradient


def proposal_log_ratio(drawn: Tensor, mean: Tensor, proposal_mean: Tensor, std: Tensor) -> Tensor:
    """log p - log q of what was drawn (B, *D) from N(proposal_mean, std^2) in the place of N(mean, std^2): (B,) nats, summed over D."""
    shift, deviation = (proposal_mean - mean).double(), (drawn - mean).double()
    noise = std.double().where(std > 0, math.inf)  # what stands still has one way to go
    return ((shift.square() - 2 * deviation * shift) / (2 * noise.square())).flatten(1).sum(1)
