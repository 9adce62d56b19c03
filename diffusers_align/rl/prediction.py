r"""What a state is worth, learned from experience: Monte Carlo, temporal differences, and what lies between.

Each function is one learner's update, made for B learners at once: tables are (B, S), each learner has a table and a transition (or an episode) of
its own, and what is returned is a new table. Equation numbers are those of Sutton and Barto, 2nd edition.

All aim at targets. Monte Carlo's is the return $G_t$, which is unbiased; TD's is $R_{t+1} + \gamma V(S_{t+1})$, which has the noise of one step and the
error of V; n steps, or $\lambda$, are between. The targets themselves are in `returns`, where advantages of denoising steps come from, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .episodes import Episodes, added, take
from .returns import lambda_returns, n_step_returns


def td0(values: Tensor, state: Tensor, reward: Tensor, next_state: Tensor, *, step_size: float, discount: float = 1.0) -> Tensor:
    r"""$V(S_t) \leftarrow V(S_t) + \alpha [R_{t+1} + \gamma V(S_{t+1}) - V(S_t)]$ (eq. 6.2), (B, S).

    Args:
        values: (B, S). The value of a state that ends an episode is 0, and stays so as long as nothing starts there.
        state, reward, next_state: (B,).
    """
    error = reward + discount * take(values, next_state) - take(values, state)
    return added(values, step_size * error, state)


def towards(values: Tensor, states: Tensor, targets: Tensor, *, step_size: float) -> Tensor:
    r"""$V(S_t) \leftarrow V(S_t) + \alpha [G_t - V(S_t)]$ for all t of an episode, with V on the right as it was before it: offline updates, (B, S).

    Args:
        values: (B, S).
        states: (B, T), visited.
        targets: (B, T), G_t.
    """
    return values.scatter_add(1, states, step_size * (targets - values.gather(1, states)))


def monte_carlo(values: Tensor, episodes: Episodes, *, step_size: float, discount: float = 1.0) -> Tensor:
    """Constant-alpha, every-visit Monte Carlo (eq. 6.1), (B, S): the target is the return, lambda = 1."""
    return td_lambda_forward(values, episodes, step_size=step_size, discount=discount, lam=1.0)


def n_step_td(values: Tensor, episodes: Episodes, *, n: int, step_size: float, discount: float = 1.0) -> Tensor:
    r"""n-step TD (eq. 7.1 and 7.2, offline), (B, S): the target is $R_{t+1} + \dots + \gamma^{n-1} R_{t+n} + \gamma^n V(S_{t+n})$."""
    targets = n_step_returns(episodes.rewards, values.gather(1, episodes.states), n=n, gamma=discount)
    return towards(values, episodes.states[:, :-1], targets, step_size=step_size)


def td_lambda_forward(values: Tensor, episodes: Episodes, *, lam: float, step_size: float, discount: float = 1.0) -> Tensor:
    r"""The offline $\lambda$-return algorithm (eq. 12.4), (B, S): the target is a mean of all n-step returns, weighted by $(1 - \lambda)\lambda^{n-1}$."""
    targets = lambda_returns(episodes.rewards, values.gather(1, episodes.states), gamma=discount, lam=lam)
    return towards(values, episodes.states[:, :-1], targets, step_size=step_size)


def td_lambda(values: Tensor, episodes: Episodes, *, lam: float, step_size: float, discount: float = 1.0, online: bool = True) -> Tensor:
    r"""TD($\lambda$) with accumulating traces (eq. 12.5 to 12.7), (B, S): $z \leftarrow \gamma\lambda z + \nabla V(S_t)$, $V \leftarrow V + \alpha\delta_t z$.

    Args:
        online: False holds V on the right-hand sides as it was before the episode; then the sum of the updates is that of the forward view, exactly.
    """
    trace, learned = torch.zeros_like(values), values
    for t in range(episodes.rewards.shape[1]):
        state, following = episodes.states[:, t], episodes.states[:, t + 1]
        seen = learned if online else values
        error = episodes.rewards[:, t] + discount * take(seen, following) - take(seen, state)
        trace = added(discount * lam * trace, torch.ones_like(error), state)
        learned = learned + step_size * error[:, None] * trace
    return learned
