"""Bellman's operators and dynamic programming: by their definitions, contractions, and routes that must agree."""

from itertools import product

import pytest
import torch
from mutants import assert_mutants_fail

from diffusers_align.rl.episodes import sample_episodes
from diffusers_align.rl.mdp import (
    FiniteMDP,
    action_values,
    divergence,
    epsilon_greedy,
    expectation_q,
    expectation_v,
    fixed_point,
    greedy,
    optimality_q,
    optimality_v,
    policy_evaluation,
    policy_iteration,
    soft_expectation_v,
    soft_maximum,
    soft_optimality_q,
    soft_optimality_v,
    soft_policy,
    soft_value_iteration,
    solved_values,
    value_iteration,
)
from diffusers_align.rl.returns import discounts

S, A, GAMMA, BETA = 5, 3, 0.9, 0.7


def made(seed: int = 0, discount: float = GAMMA) -> tuple[FiniteMDP, torch.Tensor, torch.Tensor]:
    """A process, a policy and a reference, all random."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return FiniteMDP(random(S, A, S).softmax(-1), random(S, A), discount), random(S, A).softmax(-1), random(S, A).softmax(-1)


MDP, POLICY, REFERENCE = made()
V = torch.tensor([0.3, -1.0, 2.0, 0.1, -0.4], dtype=torch.float64)
Q = torch.linspace(-1, 2, S * A, dtype=torch.float64).reshape(S, A)[:, [1, 2, 0]]


def close(found, expected):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64), rtol=1e-8, atol=1e-8)


# by their definitions, and every mutation fails


def q_by_hand(next_value) -> list[list[float]]:
    p, r = MDP.transition.tolist(), MDP.reward.tolist()
    return [[r[s][a] + GAMMA * sum(p[s][a][t] * next_value(t) for t in range(S)) for a in range(A)] for s in range(S)]


def test_action_values():
    terms = {"mdp.reward + ": "", "mdp.discount * ": "", "+ mdp": "- mdp", "@ values": "@ values.flip(0)"}
    assert_mutants_fail(lambda f: close(f(MDP, V), q_by_hand(lambda t: V[t].item())), action_values, terms)


def test_expectation_operators():
    by_hand = [sum(POLICY[s, a].item() * q_by_hand(lambda t: V[t].item())[s][a] for a in range(A)) for s in range(S)]
    terms = {"policy * ": "", ".sum(1)": ".mean(1)"}
    assert_mutants_fail(lambda f: close(f(MDP, POLICY, V), by_hand), expectation_v, terms)
    by_hand = q_by_hand(lambda t: sum(POLICY[t, a].item() * Q[t, a].item() for a in range(A)))
    assert_mutants_fail(lambda f: close(f(MDP, POLICY, Q), by_hand), expectation_q, {"policy * ": "", ".sum(1)": ".amax(1)"})


def test_optimality_operators():
    by_hand = [max(row) for row in q_by_hand(lambda t: V[t].item())]
    assert_mutants_fail(lambda f: close(f(MDP, V), by_hand), optimality_v, {"amax": "mean", "action_values(mdp, values)": "mdp.reward"})
    assert_mutants_fail(lambda f: close(f(MDP, Q), q_by_hand(lambda t: Q[t].max().item())), optimality_q, {"amax": "amin"})


def soft_by_hand(q, s):
    return BETA * torch.tensor([REFERENCE[s, a] * torch.tensor(float(q[s][a]) / BETA).exp() for a in range(A)]).sum().log().item()


def test_soft_operators():
    q = q_by_hand(lambda t: V[t].item())
    by_hand = torch.tensor([soft_by_hand(Q, s) for s in range(S)])
    terms = {"return beta * ": "return ", "reference.log() + ": "", "q / beta": "q", "logsumexp": "mean"}
    assert_mutants_fail(lambda f: torch.testing.assert_close(f(Q, REFERENCE, BETA), by_hand.double(), rtol=1e-5, atol=1e-5), soft_maximum, terms)
    for s in range(S):
        assert soft_optimality_v(MDP, REFERENCE, V, beta=BETA)[s].item() == pytest.approx(soft_by_hand(q, s), abs=1e-5)
    close(soft_optimality_q(MDP, REFERENCE, Q, beta=BETA), q_by_hand(lambda t: soft_maximum(Q, REFERENCE, BETA)[t].item()))
    price = [sum((POLICY[s, a] * (POLICY[s, a] / REFERENCE[s, a]).log()).item() for a in range(A)) for s in range(S)]
    assert_mutants_fail(lambda f: close(f(POLICY, REFERENCE), price), divergence, {"policy, reference)).sum": "reference, policy)).sum"})
    by_hand = [sum(POLICY[s, a].item() * q[s][a] for a in range(A)) - BETA * price[s] for s in range(S)]
    assert_mutants_fail(lambda f: close(f(MDP, POLICY, REFERENCE, V, beta=BETA), by_hand), soft_expectation_v, {"- beta * ": "+ beta * ", "beta * div": "div"})


def test_policies_of_values():
    assert greedy(Q).tolist() == [[0, 1, 0]] * S
    assert epsilon_greedy(Q[0], 0.3).tolist() == pytest.approx([0.1, 0.8, 0.1])
    weights = [[REFERENCE[s, a].item() * 2.718281828459045 ** (Q[s, a].item() / BETA) for a in range(A)] for s in range(S)]
    by_hand = [[w / sum(row) for w in row] for row in weights]
    assert_mutants_fail(lambda f: close(f(Q, REFERENCE, BETA), by_hand), soft_policy, {"reference.log() + ": "", "/ beta": "* beta"})
    assert divergence(greedy(Q), REFERENCE).tolist() == pytest.approx((-REFERENCE[:, 1].log()).tolist()), "0 log 0 is 0"


# contractions

OPERATORS = {
    "expectation_v": lambda mdp, x: expectation_v(mdp, POLICY, x[:, 0]),
    "expectation_q": lambda mdp, x: expectation_q(mdp, POLICY, x),
    "optimality_v": lambda mdp, x: optimality_v(mdp, x[:, 0]),
    "optimality_q": lambda mdp, x: optimality_q(mdp, x),
    "soft_optimality_v": lambda mdp, x: soft_optimality_v(mdp, REFERENCE, x[:, 0], beta=BETA),
    "soft_optimality_q": lambda mdp, x: soft_optimality_q(mdp, REFERENCE, x, beta=BETA),
    "soft_expectation_v": lambda mdp, x: soft_expectation_v(mdp, POLICY, REFERENCE, x[:, 0], beta=BETA),
}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.95])
def test_operators_contract_by_the_discount_and_keep_order(name, gamma):
    mdp, operator, generator = made(discount=gamma)[0], OPERATORS[name], torch.Generator().manual_seed(1)
    for _ in range(50):
        x, y = (torch.randn(S, A, generator=generator, dtype=torch.float64) for _ in range(2))
        x, y = (x, y) if name.endswith("q") else (x[:, :1].expand(S, A), y[:, :1].expand(S, A))
        assert (operator(mdp, x) - operator(mdp, y)).abs().max() <= gamma * (x - y).abs().max() + 1e-12
        assert (operator(mdp, x) - operator(mdp, torch.minimum(x, y))).min() >= -1e-12
        # The factor is attained: a constant comes through as gamma times it.
        close(operator(mdp, x + 3) - operator(mdp, x), torch.full_like(operator(mdp, x), 3 * gamma))


def test_sweeps_approach_at_the_rate_of_the_discount():
    optimal, values = value_iteration(MDP), torch.zeros(S, dtype=torch.float64)
    first = (values - optimal).abs().max()
    for n in range(1, 60):
        values = optimality_v(MDP, values)
        assert (values - optimal).abs().max() <= GAMMA**n * first + 1e-9
    assert (values - optimal).abs().max() > 0.5 * GAMMA**59 * first, "and not faster: the rewards do not cancel"


# routes that must agree


def test_three_routes_to_the_values_of_a_policy_agree():
    swept, solved = policy_evaluation(MDP, POLICY), solved_values(MDP, POLICY)
    close(swept, solved)
    episodes = sample_episodes(MDP, POLICY, torch.arange(S).repeat_interleave(4000), 100, torch.Generator().manual_seed(0))
    returns = (episodes.rewards * discounts(episodes.rewards, GAMMA)).sum(1).reshape(S, 4000)
    z = (returns.mean(1) - solved) / (returns.std(1) / 4000**0.5)
    assert z.abs().max() < 4
    assert_mutants_fail(lambda f: close(f(MDP, POLICY), swept), solved_values, {"- mdp.discount * ": "- ", "policy * mdp.reward": "mdp.reward"})


def test_without_a_discount_what_ends_is_worth_nothing():
    transition = torch.zeros(3, 2, 3, dtype=torch.float64)
    transition[0, :, 1] = transition[1, 0, 2] = transition[2, :, 2] = 1
    transition[1, 1, 0] = 1  # back again
    mdp = FiniteMDP(transition, torch.tensor([[1.0, 2.0], [4.0, -1.0], [0.0, 0.0]], dtype=torch.float64))
    policy = torch.tensor([[0.5, 0.5], [0.75, 0.25], [0.5, 0.5]], dtype=torch.float64)
    # V0 = 1.5 + V1, V1 = 0.75 * 4 + 0.25 (-1 + V0)
    close(solved_values(mdp, policy), [(1.5 + 2.75) / 0.75, (1.5 + 2.75) / 0.75 - 1.5, 0])
    close(policy_evaluation(mdp, policy), solved_values(mdp, policy))
    with pytest.raises(ValueError, match="No fixed point within 1000 sweeps: with a discount of 1 every state must end"):
        value_iteration(mdp, sweeps=1000)  # round and round, for 1 a time


def test_each_policy_is_at_least_as_good_as_the_one_before_and_the_last_is_the_best_of_all():
    for seed in range(5):
        mdp, start, _ = made(seed)
        best, history = policy_iteration(mdp, start)
        assert len(history) >= 2 and all((later - before).min() > -1e-10 for before, later in zip(history, history[1:]))
        assert all((later - before).max() > 1e-9 for before, later in zip(history, history[1:])), "each is truly better somewhere"
        every = torch.stack([solved_values(mdp, torch.eye(A, dtype=torch.float64)[list(actions)]) for actions in product(range(A), repeat=S)])
        close(solved_values(mdp, best), every.amax(0))
        close(value_iteration(mdp), every.amax(0))
        close(fixed_point(lambda q, mdp=mdp: optimality_q(mdp, q), torch.zeros(S, A, dtype=torch.float64)).amax(1), every.amax(0))


def test_policies_that_tie_do_not_go_round():
    mdp = FiniteMDP(MDP.transition[:, :1].expand(S, A, S), MDP.reward[:, :1].expand(S, A), GAMMA)
    best, history = policy_iteration(mdp, POLICY)
    assert len(history) == 1 and torch.equal(best, POLICY)


def test_the_soft_optimum_is_no_worse_than_any_policy_and_lies_between_the_two_ends():
    values, policy = soft_value_iteration(MDP, REFERENCE, beta=BETA)
    worth = fixed_point(lambda v: soft_expectation_v(MDP, policy, REFERENCE, v, beta=BETA), V)
    close(worth, values)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        other = (policy.log() + torch.randn(S, A, generator=generator, dtype=torch.float64)).softmax(-1)
        assert (values - fixed_point(lambda v, other=other: soft_expectation_v(MDP, other, REFERENCE, v, beta=BETA), V)).min() > 0
    q = fixed_point(lambda q: soft_optimality_q(MDP, REFERENCE, q, beta=BETA), Q)
    close(soft_maximum(q, REFERENCE, BETA), values)
    assert (value_iteration(MDP) - values).min() > 0 and (values - solved_values(MDP, REFERENCE)).min() > 0
    torch.testing.assert_close(soft_value_iteration(MDP, REFERENCE, beta=1e-4)[0], value_iteration(MDP), rtol=0, atol=0.01)
    torch.testing.assert_close(soft_value_iteration(MDP, REFERENCE, beta=1e5)[0], solved_values(MDP, REFERENCE), rtol=0, atol=1e-3)


# refusals


def test_what_is_no_process_is_refused():
    with pytest.raises(ValueError, match="needs a transition"):
        FiniteMDP(MDP.transition[:2], MDP.reward)
    with pytest.raises(ValueError, match="distribution over the next states"):
        FiniteMDP(2 * MDP.transition, MDP.reward)
    with pytest.raises(ValueError, match="from 0 to 1, got 1.5"):
        FiniteMDP(MDP.transition, MDP.reward, 1.5)
