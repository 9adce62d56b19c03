"""Draws from tables, and episodes of many learners at once."""

import torch

from diffusers_align.rl.episodes import added, draw, sample_episodes, take
from diffusers_align.rl.mdp import FiniteMDP


def test_draws_have_the_frequencies_of_their_rows():
    rows = torch.tensor([[0.2, 0.0, 0.8], [0.0, 1.0, 0.0], [0.5, 0.5, 0.0]], dtype=torch.float64)
    drawn = draw(rows.repeat_interleave(20_000, 0), torch.Generator().manual_seed(0)).reshape(3, -1)
    shares = torch.stack([torch.bincount(row, minlength=3) for row in drawn]) / 20_000
    assert (shares - rows).abs().max() < 0.012 and not shares[rows == 0].any()


def test_each_learner_has_its_own_table():
    table = torch.arange(12.0).reshape(2, 3, 2)
    first, second = torch.tensor([2, 0]), torch.tensor([1, 0])
    assert take(table, first, second).tolist() == [5, 6] and take(table, first).tolist() == [[4, 5], [6, 7]]
    changed = added(table, torch.tensor([10.0, 20.0]), first, second)
    assert changed[0, 2, 1] == 15 and changed[1, 0, 0] == 26 and (changed - table).count_nonzero() == 2 and table[0, 2, 1] == 5


def test_episodes_follow_policy_and_process():
    """Left or right on a line; right only every other time."""
    transition = torch.zeros(3, 2, 3, dtype=torch.float64)
    transition[:, 0, 0] = 1
    transition[:, 1, 1:] = 0.5
    mdp = FiniteMDP(transition, torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float64))
    policy = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]], dtype=torch.float64)
    found = sample_episodes(mdp, policy, torch.zeros(4000, dtype=torch.long), 3, torch.Generator().manual_seed(0))
    assert found.states.shape == (4000, 4) and found.actions.shape == found.rewards.shape == (4000, 3)
    assert (found.states[:, 0] == 0).all() and (found.actions[:, 0] == 1).all() and (found.rewards[:, 0] == 2).all()
    assert abs((found.states[:, 1] == 1).double().mean() - 0.5) < 0.04
    from_one = found.states[:, 1] == 1
    assert (found.actions[from_one, 1] == 0).all() and (found.states[from_one, 2] == 0).all() and (found.rewards[from_one, 1] == 3).all()
    again = sample_episodes(mdp, policy, torch.zeros(4000, dtype=torch.long), 3, torch.Generator().manual_seed(0))
    assert torch.equal(found.states, again.states)
