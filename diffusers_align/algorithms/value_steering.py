r"""Value steering: a learned Q-function picks the noise of each step. The model stays as it is.

An action of the denoising decision process is the noise of a step, and a Q-function says how well the sample will end after it. At each step M noises are
drawn, as the sampler would draw them, and the one of the largest Q goes on. Q is looked up in the state that a noise leads to, so that candidates cost no
denoiser call and no reward: a sample costs what the plain sampler's does.

$$ Q_\phi(x_k, \epsilon, c) = V_\phi(x_{k+1}, k+1, c), \qquad x_{k+1} = \mu_\theta(x_k, c) + \mathrm{std}_k\,\epsilon, \qquad
i = \arg\max_m Q_\phi(x_k, \epsilon_m, c) $$

It is learned by Q-learning with traces (Peng's Q($\lambda$)) on samples of the plain sampler first and of the steered one then, whose only reward is the last:

$$ \mathcal L = \big(V_\phi(x_{k+1}, k+1, c) - y_k\big)^2, \qquad y_k = (1 - \lambda) \max_m Q_\phi(x_{k+1}, \epsilon_m, c) + \lambda\, y_{k+1}, \qquad
y_{K-1} = r(x_0, c) $$

At $\lambda = 1$ the targets are what was earned; below, the best candidate's own value stands in for a part of that. With a temperature $\alpha > 0$ noises are
chosen with probabilities $\propto e^{Q / \alpha}$, and the maximum becomes the soft one, $\alpha \log \frac1M \sum_m e^{Q_m / \alpha}$: for many candidates
and the exact value the samples are then those of $p\,e^{r/\alpha}$, up to the first state, which nobody picks.

Source: the variant of SVDD whose value is fitted by Monte Carlo (https://arxiv.org/abs/2408.08252, SVDD-MC) is $\lambda = 1$ on plain samples alone; values of
the maximum are Q-learning's (Watkins, 1989). There is no official code of the two together.

Logged: `value_loss`, of the minibatches; `explained_variance` of the targets by what the choices along the way were
worth on the value's own word; `advantage_of_best`, by how much the
best of M noises is above the one that was taken, in units of the reward, on the values' own word.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..rl.values import value_targets


def candidates_value(values: Tensor, *, alpha: float = 0.0) -> Tensor:
    """What a choice among candidates is worth, (N,): their maximum, or the soft one.

    Args:
        values: (N, M), of the candidates.
        alpha: temperature of the choice, in units of the reward.

    Raises:
        ValueError: a negative temperature.
    """
    if alpha < 0:
        raise ValueError(f"alpha must not be negative, got {alpha:g}.")
    if alpha == 0:
        return values.amax(1)
    if math.isinf(alpha):
        return values.mean(1)
    return alpha * (torch.logsumexp(values / alpha, 1) - math.log(values.shape[1]))


def q_targets(rewards: Tensor, worth: Tensor, *, lam: float = 1.0) -> Tensor:
    """What the values of the states behind each step are to be, (N, L); NaN where the reward is.

    Args:
        rewards: (N,) of the final samples.
        worth: (N, L), `candidates_value` at each step.
        lam: 1 takes the rewards, 0 the next step's candidates alone.
    """
    return value_targets(rewards, worth, lam=lam)


def value_loss(values: Tensor, targets: Tensor) -> Tensor:
    """Squared errors (N,) of values (N,), float32."""
    return (values.float() - targets.float()).square()
