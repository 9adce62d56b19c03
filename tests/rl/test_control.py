"""SARSA, Q-learning and double Q-learning: by hand, and at the rates that theory gives."""

import pytest
import torch
from mutants import assert_mutants_fail

from diffusers_align.rl.control import double_q_learning, q_learning, sarsa, soft_q_learning
from diffusers_align.rl.episodes import draw
from diffusers_align.rl.mdp import FiniteMDP, action_values, soft_maximum, soft_value_iteration, solved_values, value_iteration

GAMMA, ALPHA, BETA = 0.9, 0.25, 0.5


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


# by hand: two learners, three states, two actions

Q = tensor([[[1.0, 2.0], [-3.0, 0.5], [0.25, 0.75]], [[0.0, 4.0], [2.0, -2.0], [1.5, -1.0]]])
OTHER = tensor([[[0.5, 0.1], [2.0, 1.0], [3.0, -0.5]], [[-1.0, 0.2], [0.3, 0.7], [0.9, 1.1]]])
STATE, ACTION, REWARD, NEXT, NEXT_ACTION = torch.tensor([0, 2]), torch.tensor([1, 0]), tensor([3.0, -2.0]), torch.tensor([1, 0]), torch.tensor([0, 0])
ONE_STEP = {"step_size": ALPHA, "discount": GAMMA}
COMMON = {
    "discount * ": "",
    "reward + ": "",
    "step_size * error": "error",
    "- take(q, state, action)": "",
    "error, state, action)": "error, next_state, action)",
}


def moved(targets, q=Q):
    """Each learner's entry, a quarter of the way to its target."""
    q = q.clone()
    for b, target in enumerate(targets):
        q[b, STATE[b], ACTION[b]] += ALPHA * (target - q[b, STATE[b], ACTION[b]].item())
    return q


def test_sarsa():
    expected = moved([3 + GAMMA * -3.0, -2 + GAMMA * 0.0])
    expected_other = moved([3 + GAMMA * 0.5, -2 + GAMMA * 4.0])

    def check(update):
        close(update(Q, STATE, ACTION, REWARD, NEXT, NEXT_ACTION, **ONE_STEP), expected)
        close(update(Q, STATE, ACTION, REWARD, NEXT, 1 - NEXT_ACTION, **ONE_STEP), expected_other)

    assert_mutants_fail(check, sarsa, COMMON | {"take(q, next_state, next_action)": "take(q, next_state).amax(-1)"})


def test_q_learning():
    expected = moved([3 + GAMMA * 0.5, -2 + GAMMA * 4.0])

    def check(update):
        before = Q.clone()
        close(update(Q, STATE, ACTION, REWARD, NEXT, **ONE_STEP), expected)
        assert torch.equal(Q, before), "pure"

    assert_mutants_fail(check, q_learning, COMMON | {".amax(-1)": ".mean(-1)", "take(q, next_state).amax": "take(q, state).amax"})


def test_double_q_learning():
    """The first learner's first table learns, valued by the second; the other learner's second, valued by the first."""
    heads = torch.tensor([True, False])

    def check(update):
        # Of the first table's row [-3, 0.5] the best is action 1, which the second table says is worth 1. Of the second's [-1, 0.2] it is 1, worth 4.
        first, second = update((Q, OTHER), STATE, ACTION, REWARD, NEXT, heads, **ONE_STEP)
        close(first, torch.stack([moved([3 + GAMMA * 1.0])[0], Q[1]]))
        close(second, torch.stack([OTHER[0], moved([0.0, -2 + GAMMA * 4.0], OTHER)[1]]))

    mutations = {
        "take(mine, next_state).argmax": "take(other, next_state).argmax", "take(other, next_state, best)": "take(mine, next_state, best)", "~heads": "heads",
        "discount * ": "", "- take(mine, state, action)": "", "reward + ": "",
    }  # fmt: skip
    assert_mutants_fail(check, double_q_learning, mutations)


def test_soft_q_learning():
    reference = tensor([[0.25, 0.75], [0.5, 0.5], [0.1, 0.9]])
    values = [soft_maximum(Q[0, 1], reference[1], BETA).item(), soft_maximum(Q[1, 0], reference[0], BETA).item()]
    expected = moved([3 + GAMMA * values[0], -2 + GAMMA * values[1]])

    def check(update):
        close(update(Q, STATE, ACTION, REWARD, NEXT, reference.log(), beta=BETA, **ONE_STEP), expected)

    mutations = COMMON | {"value = beta * ": "value = ", "log_reference[next_state] + ": "", "logsumexp": "amax", "/ beta": ""}
    assert_mutants_fail(check, soft_q_learning, mutations)


# rates, with one transition of each state and action a round: learners are rows, pairs are looked after one by one


def made(discount: float, seed: int = 0, states: int = 3, actions: int = 2) -> tuple[FiniteMDP, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    transition = torch.randn(states, actions, states, generator=generator, dtype=torch.float64).softmax(-1)
    reward = torch.randn(states, actions, generator=generator, dtype=torch.float64)
    return FiniteMDP(transition, reward, discount), torch.randn(states, actions, generator=generator, dtype=torch.float64).softmax(-1)


def rounds(mdp, update, number, learners, step_size, policy=None, seed=0, noise=1.0, start=0.0, keep=()):
    """The tables (B, S, A) of learners after each round of `keep`, when every pair was drawn once a round and its reward has noise."""
    generator, kept = torch.Generator().manual_seed(seed), {}
    states, actions = mdp.reward.shape
    q = torch.full((learners, states, actions), start, dtype=torch.float64)
    for t in range(1, number + 1):
        before, q = q, q.clone()
        for s in range(states):
            for a in range(actions):
                where = torch.full((learners,), s), torch.full((learners,), a)
                following = draw(mdp.transition[s, a].expand(learners, -1), generator)
                reward = mdp.reward[s, a] + noise * torch.randn(learners, generator=generator, dtype=torch.float64)
                more = (draw(policy[following], generator),) if policy is not None else ()
                # All pairs of a round see the tables before it.
                q[:, s, a] = update(before, *where, reward, following, *more, step_size=step_size(t), discount=mdp.discount)[:, s, a]
        if t in keep:
            kept[t] = q
    return kept


def error_of(q, exact):
    """Root mean square over learners of the largest error."""
    return (q - exact).abs().flatten(1).amax(1).square().mean().sqrt().item()


def slope(kept, exact):
    """Of the error's logarithm against that of time."""
    t = torch.tensor(sorted(kept), dtype=torch.float64).log()
    e = torch.tensor([error_of(kept[round_], exact) for round_ in sorted(kept)], dtype=torch.float64).log()
    return float(((t - t.mean()) * (e - e.mean())).sum() / (t - t.mean()).square().sum())


@pytest.mark.parametrize("name", ["sarsa", "q_learning"])
def test_errors_fall_as_the_root_of_time_with_a_step_size_for_the_discount(name):
    mdp, policy = made(0.5)
    exact = action_values(mdp, solved_values(mdp, policy) if name == "sarsa" else value_iteration(mdp))
    update, policy = (sarsa, policy) if name == "sarsa" else (q_learning, None)
    kept = rounds(mdp, update, 800, 200, lambda t: 1 / (1 + (1 - mdp.discount) * t), policy, keep=(25, 50, 100, 200, 400, 800))
    assert -0.6 < slope(kept, exact) < -0.42 and error_of(kept[800], exact) < 0.2


def test_one_over_t_forgets_the_first_error_at_the_power_that_the_discount_leaves():
    """Without noise: one state that leads to itself. The error is the product of 1 - (1 - gamma) / t, which is t^-(1 - gamma) / Gamma(gamma)."""
    mdp = FiniteMDP(torch.ones(1, 1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64), 0.9)
    kept = rounds(mdp, q_learning, 1000, 1, lambda t: 1 / t, noise=0.0, keep=(10, 100, 1000))
    exact = tensor([[10.0]])
    assert slope(kept, exact) == pytest.approx(-0.1, abs=0.005)
    assert error_of(kept[1000], exact) == pytest.approx(10 * 1000**-0.1 / torch.tensor(0.9).lgamma().exp().item(), rel=0.01)


def test_sarsas_mean_forgets_geometrically_with_a_constant_step():
    """It is linear, so E[Q_t] - Q^pi is (I - alpha (I - gamma P^pi))^t of the first error, exactly."""
    mdp, policy = made(0.8)
    exact, count = action_values(mdp, solved_values(mdp, policy)), mdp.reward.numel()
    step = torch.einsum("sat,tb->satb", mdp.transition, policy).reshape(count, count)
    matrix = torch.eye(count, dtype=torch.float64) - 0.2 * (torch.eye(count, dtype=torch.float64) - 0.8 * step)
    kept = rounds(mdp, sarsa, 20, 4000, lambda t: 0.2, policy, keep=(1, 5, 20))
    for t, q in kept.items():
        expected = exact + (torch.linalg.matrix_power(matrix, t) @ (-exact.flatten())).reshape(exact.shape)
        z = (q.mean(0) - expected) / (q.std(0) / 4000**0.5)
        assert z.abs().max() < 4


def test_a_constant_step_leaves_noise_as_its_root():
    mdp, _ = made(0.5)
    exact = action_values(mdp, value_iteration(mdp))
    left = [error_of(rounds(mdp, q_learning, int(12 / a), 300, lambda t, a=a: a, keep=(int(12 / a),))[int(12 / a)], exact) for a in (0.16, 0.04)]
    assert 1.7 < left[0] / left[1] < 2.4


def test_a_maximum_of_noise_is_taken_for_value_and_two_tables_are_not_fooled():
    """Ten actions that are worth nothing, with noise: Q-learning's best is the largest of ten errors."""
    transition = torch.zeros(3, 10, 3, dtype=torch.float64)
    transition[0, :, 1] = transition[1, :, 2] = transition[2, :, 2] = 1
    learners, generator = 1000, torch.Generator().manual_seed(0)
    single, double = torch.zeros(learners, 3, 10, dtype=torch.float64), (torch.zeros(learners, 3, 10, dtype=torch.float64),) * 2
    bias = []
    for _ in range(30):
        for s in (1, 0):
            for a in range(10 if s else 1):
                where = torch.full((learners,), s), torch.full((learners,), a)
                reward = torch.randn(learners, generator=generator, dtype=torch.float64) * s
                following, heads = torch.full((learners,), s + 1), torch.rand(learners, generator=generator) < 0.5
                single = q_learning(single, *where, reward, following, step_size=0.2)
                double = double_q_learning(double, *where, reward, following, heads, step_size=0.2)
        bias.append((single[:, 0, 0].mean().item(), torch.stack(double)[:, :, 0, 0].mean().item()))
    assert bias[-1][0] > 0.3 and abs(bias[-1][1]) < 0.05


def test_soft_q_learning_ends_at_the_soft_values():
    mdp, reference = made(0.5)
    exact = action_values(mdp, soft_value_iteration(mdp, reference, beta=BETA)[0])

    def update(q, state, action, reward, following, step_size, discount):
        return soft_q_learning(q, state, action, reward, following, reference.log(), beta=BETA, step_size=step_size, discount=discount)

    kept = rounds(mdp, update, 400, 100, lambda t: 1 / (1 + 0.5 * t), keep=(25, 50, 100, 200, 400))
    assert -0.6 < slope(kept, exact) < -0.42 and error_of(kept[400], exact) < 0.25
