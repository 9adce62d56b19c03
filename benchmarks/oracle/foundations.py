"""The classical methods on a chain as a table: each one's values beside those of dynamic programming."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffusers_align.rl.chain import aligned, as_mdp
from diffusers_align.rl.control import double_q_learning, q_learning, sarsa, soft_q_learning
from diffusers_align.rl.episodes import Episodes, sample_episodes
from diffusers_align.rl.mdp import (
    FiniteMDP,
    action_values,
    epsilon_greedy,
    expectation_q,
    expectation_v,
    fixed_point,
    optimality_q,
    optimality_v,
    policy_evaluation,
    policy_iteration,
    soft_expectation_v,
    soft_optimality_q,
    soft_value_iteration,
    solved_values,
    value_iteration,
)  # fmt: skip
from diffusers_align.rl.off_policy import ordinary_estimate, per_decision_estimate, weighted_estimate
from diffusers_align.rl.prediction import monte_carlo, n_step_td, td0, td_lambda, td_lambda_forward

from .problem import BETA, problem

LEARNERS, ROUNDS = 32, 2000
Update = Callable[[Tensor, Episodes, float], Tensor]


def small() -> tuple[FiniteMDP, Tensor, int]:
    """A chain of three steps on nine points as a table, the pretrained model's policy there, and the length of an episode."""
    held = problem(9, (1.0, 0.6, 0.3, 0.1))
    mdp, policy = as_mdp(held.chain, held.reward)
    return mdp, policy, held.chain.num_steps + 1


def dynamic_programming() -> dict[str, float]:
    """Largest differences between routes to the same values."""
    mdp, policy, _ = small()
    values, zero = solved_values(mdp, policy), torch.zeros_like(mdp.reward)
    best, _ = policy_iteration(mdp, policy)
    optimal, (soft, aligned_policy) = value_iteration(mdp), soft_value_iteration(mdp, policy, beta=BETA)

    def gap(a: Tensor, b: Tensor) -> float:
        return float((a - b).abs().max())

    return {
        "policy evaluation, to the linear solve": gap(policy_evaluation(mdp, policy), values),
        "its operator on Q": gap((policy * fixed_point(lambda q: expectation_q(mdp, policy, q), zero)).sum(1), values),
        "the solution, under its own operator": gap(expectation_v(mdp, policy, values), values),
        "policy iteration, to value iteration": gap(solved_values(mdp, best), optimal),
        "the optimal operator on Q": gap(fixed_point(lambda q: optimality_q(mdp, q), zero).amax(1), optimal),
        "V*, under its own operator": gap(optimality_v(mdp, optimal), optimal),
        "the soft operator on Q, to soft V*": gap(fixed_point(lambda q: soft_optimality_q(mdp, policy, q, beta=BETA), zero), action_values(mdp, soft)),
        "soft V*, to what its policy earns": gap(soft_expectation_v(mdp, aligned_policy, policy, soft, beta=BETA), soft),
        "its policy, to the chain's backward sweep": gap(aligned_policy[1:-1], _swept()),
    }


def _swept() -> Tensor:
    held = problem(9, (1.0, 0.6, 0.3, 0.1))
    return aligned(held.chain, held.reward, BETA)[1].flatten(0, 1)


def prediction(seed: int = 0) -> dict[str, tuple[float, float]]:
    """Of each way to learn V from experience: the error of the first state's value, mean and standard error over learners."""
    mdp, policy, length = small()
    exact = solved_values(mdp, policy)[0]
    updates: dict[str, Update] = {
        "Monte Carlo": lambda v, e, a: monte_carlo(v, e, step_size=a),
        "TD(0)": lambda v, e, a: _one_by_one(v, e, a),
        "2-step TD": lambda v, e, a: n_step_td(v, e, n=2, step_size=a),
        "TD(0.8), backward": lambda v, e, a: td_lambda(v, e, lam=0.8, step_size=a),
        "TD(0.8), forward": lambda v, e, a: td_lambda_forward(v, e, lam=0.8, step_size=a),
    }
    found = {}
    for name, update in updates.items():
        generator, values = torch.Generator().manual_seed(seed), torch.zeros(LEARNERS, len(mdp.reward), dtype=torch.float64)
        for t in range(ROUNDS):
            episodes = sample_episodes(mdp, policy, torch.zeros(LEARNERS, dtype=torch.long), length, generator)
            values = update(values, episodes, 1 / (1 + t / 20))
        error = values[:, 0] - exact
        found[name] = float(error.mean()), float(error.std() / LEARNERS**0.5)
    return found


def _one_by_one(values: Tensor, episodes: Episodes, step_size: float) -> Tensor:
    for t in range(episodes.rewards.shape[1]):
        values = td0(values, episodes.states[:, t], episodes.rewards[:, t], episodes.states[:, t + 1], step_size=step_size)
    return values


def control(seed: int = 0) -> dict[str, tuple[float, float]]:
    """Of each way to learn Q: the error of the first state's value, mean and standard error over learners. Those with a maximum start below any
    reward, so that what they have not tried is not taken for the best, and act half as the pretrained model, half at random around the best."""
    mdp, policy, length = small()
    optimal, soft = value_iteration(mdp), soft_value_iteration(mdp, policy, beta=BETA)[0]
    exact = {"SARSA": solved_values(mdp, policy), "Q-learning": optimal, "double Q-learning": optimal, "soft Q-learning": soft}
    found = {}
    for name, values in exact.items():
        generator, update = torch.Generator().manual_seed(seed), _update(name, policy)
        q = torch.full((2, LEARNERS, *mdp.reward.shape), 0.0 if name == "SARSA" else -10.0, dtype=torch.float64)
        q[:, :, -1] = 0  # behind the end
        explorer = policy if name == "SARSA" else 0.5 * policy + 0.5 * epsilon_greedy(action_values(mdp, values), 0.5)
        for t in range(ROUNDS):
            episodes = sample_episodes(mdp, explorer, torch.zeros(LEARNERS, dtype=torch.long), length, generator)
            heads = torch.rand(LEARNERS, generator=generator) < 0.5
            for i in reversed(range(length)):
                q = torch.stack(update(q, episodes, i, heads, 1 / (1 + t / 400)))
        error = _first_value(name, q, policy) - values[0]
        found[name] = float(error.mean()), float(error.std() / LEARNERS**0.5)
    return found


def _update(name: str, policy: Tensor) -> Callable[[Tensor, Episodes, int, Tensor, float], tuple[Tensor, Tensor]]:
    """The update of the tables (2, B, S, A) by step i of the episodes; all but double Q-learning have the first table alone."""

    def update(q: Tensor, episodes: Episodes, i: int, heads: Tensor, step_size: float) -> tuple[Tensor, Tensor]:
        seen = episodes.states[:, i], episodes.actions[:, i], episodes.rewards[:, i], episodes.states[:, i + 1]
        if name == "double Q-learning":
            return double_q_learning((q[0], q[1]), *seen, heads, step_size=step_size)
        if name == "SARSA":
            # Behind the last step is the end, where each action is worth 0.
            later = episodes.actions[:, min(i + 1, episodes.actions.shape[1] - 1)]
            return sarsa(q[0], *seen, later, step_size=step_size), q[1]
        if name == "Q-learning":
            return q_learning(q[0], *seen, step_size=step_size), q[1]
        return soft_q_learning(q[0], *seen, policy.log(), beta=BETA, step_size=step_size), q[1]

    return update


def _first_value(name: str, q: Tensor, policy: Tensor) -> Tensor:
    """What the tables (2, B, S, A) say of the first state, (B,)."""
    if name == "SARSA":
        return (policy[0] * q[0, :, 0]).sum(-1)
    if name == "soft Q-learning":
        return BETA * (policy[0].log() + q[0, :, 0] / BETA).logsumexp(-1)
    return (q.mean(0) if name == "double Q-learning" else q[0])[:, 0].amax(-1)


def off_policy(seed: int = 0, episodes: int = 256, repeats: int = 200) -> dict[str, tuple[float, float]]:
    """The aligned policy's value from the pretrained model's episodes: error of the estimates, mean and root mean square."""
    mdp, behaviour, length = small()
    _, target = soft_value_iteration(mdp, behaviour, beta=BETA)
    exact, generator = solved_values(mdp, target)[0], torch.Generator().manual_seed(seed)
    estimates: dict[str, list[Tensor]] = {"ordinary": [], "weighted": [], "per decision": []}
    for _ in range(repeats):
        found = sample_episodes(mdp, behaviour, torch.zeros(episodes, dtype=torch.long), length, generator)
        at = found.states[:, :-1], found.actions
        ratios = target[at] / behaviour[at]
        for name, estimate in (("ordinary", ordinary_estimate), ("weighted", weighted_estimate), ("per decision", per_decision_estimate)):
            estimates[name].append(estimate(ratios, found.rewards) - exact)
    return {name: (float(torch.stack(e).mean()), float(torch.stack(e).square().mean().sqrt())) for name, e in estimates.items()}
