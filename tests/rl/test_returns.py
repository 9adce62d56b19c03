"""Temporal differences and generalised advantages: by hand, against their sums written out, and where they are one another."""

import pytest
import torch

from diffusers_align.rl import gae, td_errors, terminal_rewards, value_advantages
from diffusers_align.rl.returns import discounts, lambda_returns, n_step_returns

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


def written_out(of_step):
    return tensor(*[[of_step(b, k) for k in range(STEPS)] for b in range(BATCH)])


# by hand


def test_terminal_rewards_come_with_the_last_step():
    assert terminal_rewards(torch.tensor([2.0, -3.0]), 3).tolist() == [[0, 0, 2], [0, 0, -3]]


def test_differences_by_hand():
    rewards, values = tensor([1, 2, 4]), tensor([10, 20, 40])
    assert td_errors(rewards, values, gamma=0.5).tolist() == [[1 + 10 - 10, 2 + 20 - 20, 4 - 40]]
    assert gae(rewards, values, gamma=0.5, lam=0.5).tolist() == [[1 + (2 - 9) / 4, 2 - 9, -36]]


def test_the_last_value_bootstraps_chains_that_are_cut_short():
    rewards, values = tensor([1, 2]), tensor([10, 20, 8])
    assert td_errors(rewards, values, gamma=0.5).tolist() == [[1, 2 + 4 - 20]]
    assert gae(rewards, values, gamma=0.5, lam=1).tolist() == [[4 - 10, 6 - 20]]


# against their sums


@pytest.mark.parametrize("columns", [STEPS, STEPS + 1])
@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (0.9, 0.0), (0.8, 1.0)])
def test_gae_is_its_sum(columns, gamma, lam):
    rewards, values = rewards_and_values(columns)

    def delta(b, k):
        return rewards[b, k].item() + gamma * value_at(values, b, k + 1) - values[b, k].item()

    expected = written_out(lambda b, k: sum((gamma * lam) ** (i - k) * delta(b, i) for i in range(k, STEPS)))
    torch.testing.assert_close(gae(rewards, values, gamma=gamma, lam=lam), expected, rtol=1e-12, atol=1e-12)


# where they are one another


def to_go(rewards, gamma):
    return written_out(lambda b, k: sum(gamma ** (i - k) * rewards[b, i].item() for i in range(k, STEPS)))


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_lambda_reaches_from_the_td_error_to_monte_carlo(gamma):
    rewards, values = rewards_and_values()
    torch.testing.assert_close(gae(rewards, values, gamma=gamma, lam=1), to_go(rewards, gamma) - values)
    torch.testing.assert_close(gae(rewards, values, gamma=gamma, lam=0), td_errors(rewards, values, gamma=gamma))


def test_a_value_that_is_right_leaves_only_what_the_policy_adds():
    rewards = rewards_and_values()[0]
    for lam in (0.0, 0.5, 1.0):
        assert gae(rewards, to_go(rewards, 0.9), gamma=0.9, lam=lam).abs().max() < 1e-12


def test_what_could_not_be_scored_has_no_advantage():
    rewards, values = terminal_rewards(torch.tensor([NAN, 1.0]), 3), torch.zeros(2, 3)
    assert gae(rewards, values, lam=1).tolist() == [[0, 0, 0], [1, 1, 1]]


def test_advantages_of_a_final_reward_between_dpoks_and_the_td_error():
    rewards, values = torch.tensor([2.0, NAN]), torch.tensor([[1.0, 1.5, 0.5], [1.0, 1.0, 1.0]])
    assert value_advantages(rewards, values).tolist() == [[1.0, 0.5, 1.5], [0, 0, 0]]
    assert value_advantages(rewards, values, lam=0.0).tolist() == [[0.5, -1.0, 1.5], [0, 0, 0]]
    assert value_advantages(rewards, values, lam=0.5).tolist() == [[0.5 + (-1 + 0.75) / 2, -1 + 0.75, 1.5], [0, 0, 0]]


def test_errors_say_what_is_wrong():
    rewards, values = rewards_and_values()
    for function in (td_errors, gae):
        with pytest.raises(ValueError, match=r"\(3, 7\), one for each step's state, or \(3, 8\) with the last state's; got \(3, 6\)"):
            function(rewards, values[:, :-1])


# targets


def test_targets_by_hand():
    rewards, values = tensor([1, 2, 4]), tensor([10, 20, 40])
    assert discounts(rewards, 0.5).tolist() == [1, 0.5, 0.25]
    assert n_step_returns(rewards, values, n=1, gamma=0.5).tolist() == [[1 + 10, 2 + 20, 4]]
    assert n_step_returns(rewards, values, n=2, gamma=0.5).tolist() == [[1 + 1 + 10, 2 + 2, 4]]
    # (1 - lambda) of one step and what is left of more, each behind the last one its own return
    assert lambda_returns(rewards, values, gamma=0.5, lam=0.25).tolist() == [[0.75 * 11 + 0.1875 * 12 + 0.0625 * 3, 0.75 * 22 + 0.25 * 4, 4]]


def test_targets_less_values_are_advantages():
    for columns in (STEPS, STEPS + 1):
        rewards, values = rewards_and_values(columns)
        targets = lambda_returns(rewards, values, gamma=0.9, lam=0.7)
        torch.testing.assert_close(targets - values[:, :STEPS], gae(rewards, values, gamma=0.9, lam=0.7))
        torch.testing.assert_close(n_step_returns(rewards, values, n=STEPS, gamma=0.9), lambda_returns(rewards, values, gamma=0.9, lam=1))
        torch.testing.assert_close(n_step_returns(rewards, values, n=1, gamma=0.9), lambda_returns(rewards, values, gamma=0.9, lam=0))


def test_targets_of_what_could_not_be_scored_are_no_numbers():
    rewards = torch.tensor([[1.0, NAN, 2.0]])
    assert lambda_returns(rewards, torch.zeros(1, 3), lam=0.5).isnan().tolist() == [[True, True, False]]
    with pytest.raises(ValueError, match="has 1 step or more, got n = 0"):
        n_step_returns(rewards, rewards, n=0)
