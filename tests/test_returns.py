"""Returns, targets and generalised advantages: by hand, against their sums written out, and where they are one another."""

import pytest
import torch

from diffusers_align.rl import discounted_returns, gae, n_step_targets, reward_to_go, td_errors, td_lambda_targets, terminal_rewards

torch.set_num_threads(1)
BATCH, STEPS = 3, 7
NAN = float("nan")


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def rewards_and_values(columns: int = STEPS, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, STEPS, generator=generator, dtype=torch.float64), torch.randn(BATCH, columns, generator=generator, dtype=torch.float64)


def value_at(values, b, k):
    """V of state k, 0 where no state is."""
    return values[b, k].item() if k < values.shape[1] else 0.0


def n_step(rewards, values, n, gamma, b, k):
    end = min(k + n, STEPS)
    return sum(gamma ** (i - k) * rewards[b, i].item() for i in range(k, end)) + gamma ** (end - k) * value_at(values, b, end)


def written_out(of_step):
    return tensor(*[[of_step(b, k) for k in range(STEPS)] for b in range(BATCH)])


# by hand


def test_terminal_rewards_come_with_the_last_step():
    assert terminal_rewards(torch.tensor([2.0, -3.0]), 3).tolist() == [[0, 0, 2], [0, 0, -3]]


def test_returns_by_hand():
    rewards = tensor([1, 2, 4])
    assert reward_to_go(rewards, gamma=0.5).tolist() == [[3, 4, 4]]
    assert discounted_returns(rewards, gamma=0.5).tolist() == [3]
    assert reward_to_go(terminal_rewards(tensor(5, 6).flatten(), 2)).tolist() == [[5, 5], [6, 6]]


def test_targets_by_hand():
    rewards, values = tensor([1, 2, 4]), tensor([10, 20, 40])
    assert td_errors(rewards, values, gamma=0.5).tolist() == [[1 + 10 - 10, 2 + 20 - 20, 4 - 40]]
    assert n_step_targets(rewards, values, 1, gamma=0.5).tolist() == [[11, 22, 4]]
    assert n_step_targets(rewards, values, 2, gamma=0.5).tolist() == [[1 + 1 + 10, 4, 4]]
    assert gae(rewards, values, gamma=0.5, lam=0.5).tolist() == [[1 + (2 - 9) / 4, 2 - 9, -36]]
    assert td_lambda_targets(rewards, values, gamma=0.5, lam=0.5).tolist() == [[11 - 7 / 4, 13, 4]]


def test_the_last_value_bootstraps_chains_that_are_cut_short():
    rewards, values = tensor([1, 2]), tensor([10, 20, 8])
    assert td_errors(rewards, values, gamma=0.5).tolist() == [[1, 2 + 4 - 20]]
    assert n_step_targets(rewards, values, 5, gamma=0.5).tolist() == [[1 + 1 + 2, 2 + 4]]
    assert td_lambda_targets(rewards, values, gamma=0.5, lam=1).tolist() == [[4, 6]]
    assert gae(rewards, values, gamma=0.5, lam=1).tolist() == [[4 - 10, 6 - 20]]


# against their sums


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_reward_to_go_is_its_sum(gamma):
    rewards, _ = rewards_and_values()
    expected = written_out(lambda b, k: sum(gamma ** (i - k) * rewards[b, i].item() for i in range(k, STEPS)))
    torch.testing.assert_close(reward_to_go(rewards, gamma=gamma), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(discounted_returns(rewards, gamma=gamma), expected[:, 0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("columns", [STEPS, STEPS + 1])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("n", [1, 2, 5, STEPS, STEPS + 3])
def test_n_step_targets_are_their_sums(columns, gamma, n):
    rewards, values = rewards_and_values(columns)
    expected = written_out(lambda b, k: n_step(rewards, values, n, gamma, b, k))
    torch.testing.assert_close(n_step_targets(rewards, values, n, gamma=gamma), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("columns", [STEPS, STEPS + 1])
@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (0.9, 0.0), (0.8, 1.0)])
def test_gae_is_its_sum_and_td_lambda_the_mean_of_n_step_targets(columns, gamma, lam):
    rewards, values = rewards_and_values(columns)

    def delta(b, k):
        return rewards[b, k].item() + gamma * value_at(values, b, k + 1) - values[b, k].item()

    def mixture(b, k):
        last = STEPS - k  # from there on all are the Monte Carlo return, which gets the weight that is left
        return sum((1 - lam) * lam ** (n - 1) * n_step(rewards, values, n, gamma, b, k) for n in range(1, last)) + lam ** (last - 1) * n_step(
            rewards, values, last, gamma, b, k
        )

    expected = written_out(lambda b, k: sum((gamma * lam) ** (i - k) * delta(b, i) for i in range(k, STEPS)))
    torch.testing.assert_close(gae(rewards, values, gamma=gamma, lam=lam), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(td_lambda_targets(rewards, values, gamma=gamma, lam=lam), written_out(mixture), rtol=1e-12, atol=1e-12)


# where they are one another


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_lambda_and_n_reach_from_the_td_error_to_monte_carlo(gamma):
    rewards, values = rewards_and_values()
    monte_carlo, one_step = reward_to_go(rewards, gamma=gamma), td_errors(rewards, values, gamma=gamma)
    torch.testing.assert_close(gae(rewards, values, gamma=gamma, lam=1), monte_carlo - values)
    torch.testing.assert_close(gae(rewards, values, gamma=gamma, lam=0), one_step)
    torch.testing.assert_close(td_lambda_targets(rewards, values, gamma=gamma, lam=1), monte_carlo)
    torch.testing.assert_close(td_lambda_targets(rewards, values, gamma=gamma, lam=0), one_step + values)
    torch.testing.assert_close(n_step_targets(rewards, values, STEPS, gamma=gamma), monte_carlo)
    torch.testing.assert_close(n_step_targets(rewards, values, 1, gamma=gamma), one_step + values)


def test_a_value_that_is_right_leaves_only_what_the_policy_adds():
    rewards = rewards_and_values()[0]
    values = reward_to_go(rewards, gamma=0.9)
    for lam in (0.0, 0.5, 1.0):
        assert gae(rewards, values, gamma=0.9, lam=lam).abs().max() < 1e-12
        torch.testing.assert_close(td_lambda_targets(rewards, values, gamma=0.9, lam=lam), values)


def test_what_could_not_be_scored_has_no_advantage_and_no_target():
    rewards, values = terminal_rewards(torch.tensor([NAN, 1.0]), 3), torch.zeros(2, 3)
    assert gae(rewards, values, lam=1).tolist() == [[0, 0, 0], [1, 1, 1]]
    assert td_lambda_targets(rewards, values).isnan().tolist() == [[True] * 3, [False] * 3]


def test_errors_say_what_is_wrong():
    rewards, values = rewards_and_values()
    for function in (td_errors, gae, td_lambda_targets, lambda r, v: n_step_targets(r, v, 2)):
        with pytest.raises(ValueError, match=r"\(3, 7\), one for each step's state, or \(3, 8\) with the last state's; got \(3, 6\)"):
            function(rewards, values[:, :-1])
    with pytest.raises(ValueError, match="n = 0"):
        n_step_targets(rewards, values, 0)
