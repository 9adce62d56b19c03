r"""A finite Markov decision process, solved exactly: Bellman's operators, and the algorithms of dynamic programming that apply them.

States s, actions a, $p(s' \mid s, a)$, a mean reward $r(s, a)$ and a discount $\gamma$. A policy is a table $\pi(a \mid s)$, values are tables V(s) and
Q(s, a). This is what the algorithms of this package are held against: `chain.discretised_chain` makes such a process of a denoising chain.

Equation numbers are those of Sutton and Barto, Reinforcement Learning, 2nd edition (2018). The soft operators are those of KL-regularised control:
each action costs $\beta \log(\pi / \pi_{ref})$ (https://arxiv.org/abs/1704.06440, section 3), and their optimum is

$$ \pi^*(a \mid s) = \pi_{ref}(a \mid s)\, \exp\big((Q^*(s, a) - V^*(s)) / \beta\big), \qquad
V^*(s) = \beta \log \sum_a \pi_{ref}(a \mid s)\, e^{Q^*(s, a) / \beta} $$

Each operator is a contraction in the largest difference, with modulus $\gamma$. With $\gamma = 1$ they still have one fixed point where
every policy ends: at a state that leads to itself and pays nothing, whose value is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FiniteMDP:
    """States, actions and what they lead to.

    Attributes:
        transition: (S, A, S), the probability of each next state; rows sum to 1.
        reward: (S, A), the mean reward.
        discount: gamma, from 0 to 1; 1 for processes that end.

    Raises:
        ValueError: the shapes do not fit, a row is no distribution, or gamma is out of range.
    """

    transition: Tensor
    reward: Tensor
    discount: float = 1.0

    def __post_init__(self):
        states, actions = self.reward.shape
        if self.transition.shape != (states, actions, states):
            raise ValueError(f"A reward (S, A) = {(states, actions)} needs a transition (S, A, S), got {tuple(self.transition.shape)}.")
        sums = self.transition.sum(-1)
        if bool((self.transition < 0).any()) or not torch.allclose(sums, torch.ones_like(sums), atol=1e-5):
            raise ValueError("Each transition[s, a] must be a distribution over the next states: not negative, with sum 1.")
        if not 0 <= self.discount <= 1:
            raise ValueError(f"A discount is a number from 0 to 1, got {self.discount}.")


# --- Bellman's operators -----------------------------------------------------------------------------------------------


def action_values(mdp: FiniteMDP, values: Tensor) -> Tensor:
    r"""$Q(s, a) = r(s, a) + \gamma \sum_{s'} p(s' \mid s, a)\, V(s')$, (S, A), of values (S,): what the operators below share (eq. 4.6)."""
    return mdp.reward + mdp.discount * mdp.transition @ values


def expectation_v(mdp: FiniteMDP, policy: Tensor, values: Tensor) -> Tensor:
    r"""$(T^\pi V)(s) = \sum_a \pi(a \mid s)\, Q(s, a)$, (S,): Bellman's expectation operator (eq. 4.5)."""
    return (policy * action_values(mdp, values)).sum(1)


def expectation_q(mdp: FiniteMDP, policy: Tensor, q: Tensor) -> Tensor:
    r"""$(T^\pi Q)(s, a) = r(s, a) + \gamma \sum_{s'} p(s' \mid s, a) \sum_{a'} \pi(a' \mid s')\, Q(s', a')$, (S, A) (eq. 4.5, of Q)."""
    return action_values(mdp, (policy * q).sum(1))


def optimality_v(mdp: FiniteMDP, values: Tensor) -> Tensor:
    r"""$(T V)(s) = \max_a Q(s, a)$, (S,): Bellman's optimality operator (eq. 4.10)."""
    return action_values(mdp, values).amax(1)


def optimality_q(mdp: FiniteMDP, q: Tensor) -> Tensor:
    r"""$(T Q)(s, a) = r(s, a) + \gamma \sum_{s'} p(s' \mid s, a) \max_{a'} Q(s', a')$, (S, A) (eq. 4.2)."""
    return action_values(mdp, q.amax(1))


def soft_maximum(q: Tensor, reference: Tensor, beta: float) -> Tensor:
    r"""$\beta \log \sum_a \pi_{ref}(a \mid s)\, e^{Q(s, a) / \beta}$, (S,): the most that Q (S, A) minus the price of leaving `reference` (S, A) can be."""
    return beta * (reference.log() + q / beta).logsumexp(-1)


def soft_optimality_v(mdp: FiniteMDP, reference: Tensor, values: Tensor, *, beta: float) -> Tensor:
    """(T V)(s) = `soft_maximum` of Q(s, .), (S,)."""
    return soft_maximum(action_values(mdp, values), reference, beta)


def soft_optimality_q(mdp: FiniteMDP, reference: Tensor, q: Tensor, *, beta: float) -> Tensor:
    r"""$(T Q)(s, a) = r(s, a) + \gamma \sum_{s'} p(s' \mid s, a)$ `soft_maximum` of Q(s', .), (S, A)."""
    return action_values(mdp, soft_maximum(q, reference, beta))


def soft_expectation_v(mdp: FiniteMDP, policy: Tensor, reference: Tensor, values: Tensor, *, beta: float) -> Tensor:
    r"""$(T^\pi V)(s) = \sum_a \pi(a \mid s) \big(Q(s, a) - \beta \log \tfrac{\pi(a \mid s)}{\pi_{ref}(a \mid s)}\big)$, (S,):
    `expectation_v` with the price paid."""
    return expectation_v(mdp, policy, values) - beta * divergence(policy, reference)


def divergence(policy: Tensor, reference: Tensor) -> Tensor:
    r"""$\mathrm{KL}(\pi \| \pi_{ref})$ at each state, (S,) nats; 0 log 0 is 0."""
    return (torch.special.xlogy(policy, policy) - torch.special.xlogy(policy, reference)).sum(-1)


# --- policies ----------------------------------------------------------------------------------------------------------


def greedy(q: Tensor) -> Tensor:
    """The policy (S, A) that takes the first of the best actions (eq. 4.9)."""
    return torch.nn.functional.one_hot(q.argmax(-1), q.shape[-1]).to(q)


def epsilon_greedy(q: Tensor, epsilon: float) -> Tensor:
    """(..., A): any action with probability epsilon, the best one otherwise (section 5.4)."""
    return (1 - epsilon) * greedy(q) + epsilon / q.shape[-1]


def soft_policy(q: Tensor, reference: Tensor, beta: float) -> Tensor:
    r"""$\pi(a \mid s) \propto \pi_{ref}(a \mid s)\, e^{Q(s, a) / \beta}$, (S, A): where `soft_maximum` is attained."""
    return (reference.log() + q / beta).softmax(-1)


# --- dynamic programming -----------------------------------------------------------------------------------------------


def fixed_point(operator: Callable[[Tensor], Tensor], start: Tensor, *, tolerance: float = 1e-10, sweeps: int = 100_000) -> Tensor:
    """Apply `operator` from `start` on until no entry moves by more than `tolerance`.

    Raises:
        ValueError: `sweeps` did not suffice: of a discount of 1, some state never ends.
    """
    for _ in range(sweeps):
        before, start = start, operator(start)
        if bool(((start - before).abs() <= tolerance).all()):
            return start
    raise ValueError(f"No fixed point within {sweeps} sweeps: with a discount of 1 every state must end, or allow more.")


def policy_evaluation(mdp: FiniteMDP, policy: Tensor, **options) -> Tensor:
    """V of a policy (S, A), (S,), by sweeps from 0 (section 4.1). `options` are those of `fixed_point`."""
    return fixed_point(lambda values: expectation_v(mdp, policy, values), torch.zeros_like(mdp.reward[:, 0]), **options)


def solved_values(mdp: FiniteMDP, policy: Tensor) -> Tensor:
    r"""V of a policy (S, A), (S,), by a linear solve: $(I - \gamma P^\pi) V = r^\pi$ (section 4.1).

    States that lead to themselves alone and pay nothing are worth 0, so gamma may be 1.
    """
    step = torch.einsum("sa,sat->st", policy, mdp.transition)
    reward = (policy * mdp.reward).sum(1)
    ended = (step.diagonal() >= 1 - 1e-12) & (reward == 0)
    matrix = torch.eye(len(step)).to(step) - mdp.discount * step.masked_fill(ended[:, None], 0.0)
    return torch.linalg.solve(matrix, reward)


def policy_iteration(mdp: FiniteMDP, policy: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The optimal policy (S, A), by evaluating exactly and being greedy, from `policy` on (section 4.3); and the values (S,) of all on the way,
    each at least as large in every state as the one before (eq. 4.8).

    An action is changed for a truly better one alone, so ties do not go round.
    """
    history = []
    while True:
        values = solved_values(mdp, policy)
        history.append(values)
        q = action_values(mdp, values)
        better = q.amax(1) > (policy * q).sum(1) + 1e-9 * (1 + q.abs().amax(1))
        if not bool(better.any()):
            return policy, history
        policy = torch.where(better[:, None], greedy(q), policy)


def value_iteration(mdp: FiniteMDP, **options) -> Tensor:
    """V* (S,), by sweeps from 0 (section 4.4). `options` are those of `fixed_point`."""
    return fixed_point(lambda values: optimality_v(mdp, values), torch.zeros_like(mdp.reward[:, 0]), **options)


def soft_value_iteration(mdp: FiniteMDP, reference: Tensor, *, beta: float, **options) -> tuple[Tensor, Tensor]:
    """V* (S,) and the optimal policy (S, A) of the KL-regularised problem. `options` are those of `fixed_point`."""
    values = fixed_point(lambda values: soft_optimality_v(mdp, reference, values, beta=beta), torch.zeros_like(mdp.reward[:, 0]), **options)
    return values, soft_policy(action_values(mdp, values), reference, beta)
