"""Monte Carlo and temporal differences: by hand, one as the other's limit, and where they end."""

import pytest
import torch
from mutants import assert_mutants_fail

from diffusers_align.rl.episodes import Episodes, sample_episodes
from diffusers_align.rl.mdp import FiniteMDP, solved_values
from diffusers_align.rl.prediction import monte_carlo, n_step_td, td0, td_lambda, td_lambda_forward, towards
from diffusers_align.rl.returns import lambda_returns

GAMMA, ALPHA, LAM = 0.9, 0.25, 0.6


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def close(found, expected):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


# Two learners; the first comes back to a state. State 3 is the end.
STATES = torch.tensor([[0, 1, 0, 3], [2, 1, 2, 3]])
REWARDS = tensor([[1.0, -2.0, 4.0], [0.5, 3.0, -1.0]])
EPISODES = Episodes(STATES, torch.zeros(2, 3, dtype=torch.long), REWARDS)
VALUES = tensor([[0.5, -1.0, 2.0, 0.0], [1.5, 0.25, -0.5, 0.0]])


def by_hand(target) -> list[list[float]]:
    """Offline updates: each visit moves its state by alpha times what the target is more than its first value."""
    moved = VALUES.tolist()
    for b in range(2):
        for t in range(3):
            s = STATES[b, t].item()
            moved[b][s] += ALPHA * (target(b, t) - VALUES[b, s].item())
    return moved


def n_step_target(n):
    def target(b, t):
        reach = min(n, 3 - t)
        return sum(GAMMA**i * REWARDS[b, t + i].item() for i in range(reach)) + GAMMA**reach * VALUES[b, STATES[b, t + reach]].item()

    return target


def lambda_target(b, t):
    """The mean of all n-step returns; those that reach the end have what is left of the weight."""
    rest = 3 - t
    weighed = sum((1 - LAM) * LAM ** (n - 1) * n_step_target(n)(b, t) for n in range(1, rest))
    return weighed + LAM ** (rest - 1) * n_step_target(rest)(b, t)


def test_td0():
    state, following = torch.tensor([0, 2]), torch.tensor([1, 3])
    expected = VALUES.clone()
    expected[0, 0] += ALPHA * (7 + GAMMA * -1.0 - 0.5)
    expected[1, 2] += ALPHA * (8 + 0 - -0.5)

    def check(update):
        before = VALUES.clone()
        close(update(VALUES, state, tensor([7.0, 8.0]), following, step_size=ALPHA, discount=GAMMA), expected)
        assert torch.equal(VALUES, before), "pure"

    mutations = {
        "reward + ": "", "discount * ": "", "take(values, next_state)": "0.0", "- take(values, state)": "",
        "step_size * ": "", "error, state)": "error, next_state)"
    }  # fmt: skip
    assert_mutants_fail(check, td0, mutations)


def test_monte_carlo_moves_each_visit_towards_its_return():
    def check(update):
        close(update(VALUES, EPISODES, step_size=ALPHA, discount=GAMMA), by_hand(n_step_target(3)))

    assert_mutants_fail(check, monte_carlo, {"lam=1.0": "lam=0.9", "discount=discount": "discount=1.0", "step_size=step_size": "step_size=2 * step_size"})


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_n_step(n):
    def check(update):
        close(update(VALUES, EPISODES, n=n, step_size=ALPHA, discount=GAMMA), by_hand(n_step_target(n)))

    mutations = {"gamma=discount": "gamma=1.0", "[:, :-1]": "[:, 1:]"} | ({"n=n": "n=n + 1"} if n < 3 else {})
    assert_mutants_fail(check, n_step_td, mutations)


def test_forward_view():
    def check(update):
        close(update(VALUES, EPISODES, lam=LAM, step_size=ALPHA, discount=GAMMA), by_hand(lambda_target))

    assert_mutants_fail(check, td_lambda_forward, {"lam=lam": "lam=0.95", "gamma=discount": "gamma=1.0", "[:, :-1]": "[:, 1:]"})
    mutations = {"targets - values": "targets + values", "step_size * ": "", "values.gather(1, states)": "0.0"}
    assert_mutants_fail(lambda f: close(f(VALUES, STATES[:, :2], REWARDS[:, :2], step_size=ALPHA), towards_by_hand()), towards, mutations)


def towards_by_hand():
    moved = VALUES.tolist()
    for b in range(2):
        for t in range(2):
            moved[b][STATES[b, t]] += ALPHA * (REWARDS[b, t].item() - VALUES[b, STATES[b, t]].item())
    return moved


def test_backward_view():
    """Offline it is the forward view, exactly; online it is the trace, step by step."""
    traced = VALUES.tolist()
    for b in range(2):
        z = [0.0] * 4
        for t in range(3):
            s, s2 = STATES[b, t].item(), STATES[b, t + 1].item()
            error = REWARDS[b, t].item() + GAMMA * traced[b][s2] - traced[b][s]
            z = [GAMMA * LAM * value for value in z]
            z[s] += 1
            traced[b] = [value + ALPHA * error * e for value, e in zip(traced[b], z)]

    def check(update):
        options = {"lam": LAM, "step_size": ALPHA, "discount": GAMMA}
        close(update(VALUES, EPISODES, **options), traced)
        close(update(VALUES, EPISODES, **options, online=False), by_hand(lambda_target))

    mutations = {
        "discount * lam * trace": "discount * trace", "+ discount * take(seen, following)": "+ take(seen, following)", " - take(seen, state)": "",
        "if online": "if not online", "* trace\n": "\n", "episodes.rewards[:, t] + ": "",
    }  # fmt: skip
    assert_mutants_fail(check, td_lambda, mutations)


def test_ends_of_lambda():
    options = {"step_size": ALPHA, "discount": GAMMA}
    close(td_lambda(VALUES, EPISODES, lam=0.0, online=False, **options), n_step_td(VALUES, EPISODES, n=1, **options))
    close(td_lambda(VALUES, EPISODES, lam=1.0, online=False, **options), monte_carlo(VALUES, EPISODES, **options))
    online = VALUES
    for t in range(3):
        online = td0(online, STATES[:, t], REWARDS[:, t], STATES[:, t + 1], **options)
    close(td_lambda(VALUES, EPISODES, lam=0.0, **options), online)


# where they end: the random walk of five states (Sutton and Barto, example 6.2), whose values are 1/6 to 5/6


def random_walk() -> tuple[FiniteMDP, torch.Tensor]:
    transition = torch.zeros(6, 2, 6, dtype=torch.float64)
    for s in range(5):
        transition[s, 0, s - 1 if s else 5] = transition[s, 1, s + 1 if s < 4 else 5] = 1
    transition[5, :, 5] = 1
    reward = torch.zeros(6, 2, dtype=torch.float64)
    reward[4, 1] = 1
    return FiniteMDP(transition, reward), torch.full((6, 2), 0.5, dtype=torch.float64)


def test_the_random_walks_values():
    close(solved_values(*random_walk()), [1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 0])


UPDATES = {
    "monte_carlo": lambda v, e, a: monte_carlo(v, e, step_size=a),
    "n_step": lambda v, e, a: n_step_td(v, e, n=4, step_size=a),
    "td_lambda": lambda v, e, a: td_lambda(v, e, lam=0.8, step_size=a),
    "td0": lambda v, e, a: td_lambda(v, e, lam=0.0, step_size=a),
}


@pytest.mark.parametrize("name", UPDATES)
def test_the_mean_over_learners_ends_at_the_values(name):
    mdp, policy = random_walk()
    exact, learners, generator = solved_values(mdp, policy), 300, torch.Generator().manual_seed(0)
    values = tensor([0.5] * 5 + [0.0]).repeat(learners, 1)
    for t in range(150):
        episodes = sample_episodes(mdp, policy, torch.full((learners,), 2), 60, generator)
        # The end is visited too, and nothing is learned there: its rewards and its value are 0.
        values = UPDATES[name](values, episodes, 0.25 / (1 + t / 15))
        values[:, 5] = 0
    error = (values.mean(0) - exact)[:5]
    spread = values.std(0)[:5] / learners**0.5
    assert (error.abs() < 4 * spread + 0.02).all() and error.abs().max() < 0.04


def test_td0_ends_at_the_noise_that_its_step_size_leaves():
    """With a constant step the variance of the estimate is proportional to it (to first order): a quarter of the step, a quarter of the variance."""
    mdp, policy = random_walk()
    spreads = []
    for step_size in (0.16, 0.04):
        generator, values = torch.Generator().manual_seed(0), solved_values(mdp, policy).expand(400, 6).clone()
        for _ in range(int(8 / step_size)):
            episodes = sample_episodes(mdp, policy, torch.full((400,), 2), 40, generator)
            values = td_lambda(values, episodes, lam=0.0, step_size=step_size)
            values[:, 5] = 0
        spreads.append(values[:, 2].var().item())
    assert 2.8 < spreads[0] / spreads[1] < 5.6


def test_targets_of_many_steps_are_noisier_and_less_wrong():
    mdp, policy = random_walk()
    exact = solved_values(mdp, policy)
    wrong = exact + tensor([0.3, 0.0, 0.3, 0.0, 0.3, 0.0])  # what stands two steps away is wrong as well
    episodes = sample_episodes(mdp, policy, torch.full((20_000,), 2), 80, torch.Generator().manual_seed(0))
    values, bias, variance = wrong[episodes.states], [], []
    for lam in (0.0, 0.5, 0.9, 1.0):
        targets = lambda_returns(episodes.rewards, values, lam=lam)[:, 0]
        bias.append(abs(targets.mean().item() - exact[2].item()))
        variance.append(targets.var().item())
    assert bias[3] < 0.015 < bias[2] < 0.3 and variance == sorted(variance)
