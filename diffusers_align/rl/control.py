r"""How to act, learned from transitions: SARSA, Q-learning and double Q-learning, on tables.

Each function is one update, made for B learners at once: tables are (B, S, A), each learner has one transition (B,), and what is returned is a new
table. Equation numbers are those of Sutton and Barto, 2nd edition.

Rates. With one transition of each state and action a round, a step size of $1 / (1 + (1 - \gamma) t)$ makes the error fall as
$1 / \sqrt t$ (Wainwright, https://arxiv.org/abs/1905.06265); 1 / t leaves a share of $t^{-(1 - \gamma)}$ of the first error
(Szepesvari, 1998; Even-Dar and Mansour, JMLR 5, 2003); a constant one forgets it geometrically and keeps a noise of the order of $\sqrt\alpha$.
"""

from __future__ import annotations

from torch import Tensor

from .episodes import added, take


def sarsa(
    q: Tensor, state: Tensor, action: Tensor, reward: Tensor, next_state: Tensor, next_action: Tensor, *, step_size: float, discount: float = 1.0
) -> Tensor:
    r"""$Q(S, A) \leftarrow Q(S, A) + \alpha [R + \gamma Q(S', A') - Q(S, A)]$ (eq. 6.7), (B, S, A): the values of the policy that acts.

    Args:
        q: (B, S, A). Of a state that ends an episode they are 0.
        state, action, reward, next_state, next_action: (B,).
    """
    error = reward + discount * take(q, next_state, next_action) - take(q, state, action)
    return added(q, step_size * error, state, action)


def q_learning(q: Tensor, state: Tensor, action: Tensor, reward: Tensor, next_state: Tensor, *, step_size: float, discount: float = 1.0) -> Tensor:
    r"""$Q(S, A) \leftarrow Q(S, A) + \alpha [R + \gamma \max_a Q(S', a) - Q(S, A)]$ (eq. 6.8), (B, S, A): the optimal values, whoever acts."""
    error = reward + discount * take(q, next_state).amax(-1) - take(q, state, action)
    return added(q, step_size * error, state, action)


def double_q_learning(
    q: tuple[Tensor, Tensor],
    state: Tensor,
    action: Tensor,
    reward: Tensor,
    next_state: Tensor,
    heads: Tensor,
    *,
    step_size: float,
    discount: float = 1.0,
) -> tuple[Tensor, Tensor]:
    r"""$Q_1(S, A) \leftarrow Q_1(S, A) + \alpha [R + \gamma Q_2(S', \arg\max_a Q_1(S', a)) - Q_1(S, A)]$, or with 1 and 2 exchanged (eq. 6.10).

    One table says which action is best and the other what it is worth, so the noise of the largest is not taken for value.

    Args:
        q: two tables (B, S, A).
        heads: (B,) bool, by the toss of a coin: the first table learns where True.
    """
    first, second = q

    def error(mine: Tensor, other: Tensor) -> Tensor:
        best = take(mine, next_state).argmax(-1)
        return reward + discount * take(other, next_state, best) - take(mine, state, action)

    changes = error(first, second).where(heads, 0.0), error(second, first).where(~heads, 0.0)
    return added(first, step_size * changes[0], state, action), added(second, step_size * changes[1], state, action)


def soft_q_learning(
    q: Tensor, state: Tensor, action: Tensor, reward: Tensor, next_state: Tensor, log_reference: Tensor, *, beta: float, step_size: float, discount: float = 1.0
) -> Tensor:
    r"""Q-learning with $\beta \log \sum_a \pi_{ref}(a \mid S')\, e^{Q(S', a) / \beta}$ in the place of the maximum (https://arxiv.org/abs/1704.06440,
    section 3), (B, S, A): the values whose `mdp.soft_policy` is the aligned one.

    Args:
        log_reference: (S, A).
    """
    value = beta * (log_reference[next_state] + take(q, next_state) / beta).logsumexp(-1)
    error = reward + discount * value - take(q, state, action)
    return added(q, step_size * error, state, action)
