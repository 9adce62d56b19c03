r"""Discrete Adjoint Matching: Adjoint Matching for Markov chains over tokens (https://arxiv.org/abs/2602.07132).

A discrete diffusion model jumps from state x to y at the rate u(y, x). Steering it towards low energy g at the price of its path KL
multiplies each rate by a ratio of values, and the samples follow $p_{base}(x)\, e^{-g(x)}/Z$. As in the continuous case that ratio
is a mean over trajectories, so that the rates can be regressed on samples of it: here the adjoint multiplies, and the regression is the
Bregman divergence of Poisson rates.

$$ u^*_t(y, x) = u_{base}(y, x)\, e^{V_t(x) - V_t(y)}, \qquad V_t(x) = -\log \mathbb E_{base}\big[e^{-g(X_1)} \mid X_t = x\big] $$

$$ \tilde a_1(y; X_1) = e^{-g(y) + g(X_1)}, \qquad \tilde a_t(y; X_1) = \sum_z p_{base}(X_1 = z \mid X_t = y)\, e^{-g(z) + g(X_1)}, \qquad
L = \mathbb E \sum_{y \ne x} u - w + w \log\frac{w}{u}, \quad w = \tilde a_t\, u_{base} $$

with $X$ drawn from the fine-tuned chain, without gradient. The loss is least at $u = \mathbb E[w]$, whose fixed point is $u^*$. The reward's
scale is inside the energy: $g = -\lambda r$.

In masked diffusion the only edges lead from a mask to a token. There the tilted rates of a position sum to the base's: when a position is
unmasked stays as it was, what it becomes is tilted (the paper's proposition 2.5). A model of the token alone can hold the optimum.

There is no official code. The adjoint's completions z are drawn, not summed, where the states are too many; with the current model in
the place of the base they are weighted by $p_{base}/p_u$ (`log_adjoint`, which also normalises by such a mean at x: less noise than the
single $e^{g(X_1)}$, and no bias as the samples grow many). Logarithms of weights are kept within 30 of 0, for the exponential's sake.

diffusers has no maintained pipeline from text to images of this kind: VQ-Diffusion and aMUSEd are deprecated (0.42), and what is
maintained with discrete states writes text (LLaDA 2, DiffusionGemma). So there are these functions and an example
(`benchmarks/discrete_adjoint_matching.py`), no script.

Logged by the example: `kl`, of the terminal law from the tilted one, in nats.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_LOG_WEIGHT = 30.0


def log_weight(energy: Tensor, base_log_prob: Tensor | float = 0.0, log_prob: Tensor | float = 0.0) -> Tensor:
    """log(p_base(z) / p_u(z)) - g(z) of completions z, any shape; the probabilities cancel for completions by the base."""
    return base_log_prob - log_prob - energy


def log_adjoint(next_log_weights: Tensor, log_weights: Tensor, *, max_log_weight: float = MAX_LOG_WEIGHT) -> Tensor:
    r"""$\log \tilde a(y)$, (B, E), for E edges x -> y of B samples.

    Args:
        next_log_weights: (B, E, S), `log_weight` of S completions of each y; or, to sum over all states z in the place of samples,
            those plus log(S p_base(z | y)).
        log_weights: (B, S'), of S' completions of x. The formula's own adjoint is S' = 1 with the sample's final state X_1 of energy g:
            -g, whatever drew it.
        max_log_weight: bound of the result's absolute value.
    """
    ratio = _log_mean(next_log_weights) - _log_mean(log_weights)[:, None]
    return ratio.clamp(-max_log_weight, max_log_weight)


def _log_mean(log_weights: Tensor) -> Tensor:
    return log_weights.logsumexp(-1) - math.log(log_weights.shape[-1])


def generalized_kl_loss(log_rate: Tensor, base_log_rate: Tensor, log_adjoint: Tensor, *, proposal: Tensor | None = None) -> Tensor:
    r"""$\sum_y u - w + w \log(w/u)$ with $w = \tilde a\, u_{base}$, (B,).

    Args:
        log_rate: (B, E), log u of the edges, with gradient. -inf marks an edge that does not exist, in both rates alike.
        base_log_rate, log_adjoint: (B, E), without gradient.
        proposal: (B, E), the probabilities with which the edges were drawn: their terms are divided by it, and averaged over E. None: all
            edges are there.

    Raises:
        ValueError: an edge exists for one of the rates only, where the divergence is infinite.
    """
    missing = log_rate.isneginf()
    if not torch.equal(missing, base_log_rate.isneginf()):
        raise ValueError("The rates have different edges: one of them is 0 where the other is not, so their divergence is infinite.")
    log_u = torch.where(missing, 0.0, log_rate)
    log_w = torch.where(missing, 0.0, base_log_rate + log_adjoint).detach()
    terms = torch.where(missing, 0.0, log_u.exp() - log_w.exp() + log_w.exp() * (log_w - log_u))
    return terms.sum(1) if proposal is None else (terms / proposal).mean(1)
