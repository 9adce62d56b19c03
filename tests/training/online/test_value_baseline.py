"""A learned value as the baseline of steps: which steps it is about, what it is fitted to, how advantages are scaled."""

from types import SimpleNamespace

import pytest
import torch

from diffusers_align.rl.values import ValueBaseline
from diffusers_align.training.online.value_baseline import learned_advantages, normalised

NAN = float("nan")
ARGS = SimpleNamespace(seed=0, value_buffer_size=100, value_steps=1)


class Trajectory:
    """Four solver steps, of which the first and the third have noise."""

    noisy_steps, num_steps = [0, 2], 4

    def __init__(self, number: int, seed: int = 0):
        self.states = torch.randn(number, 4, 3, generator=torch.Generator().manual_seed(seed))
        self.condition = [0.0] * number

    def __len__(self):
        return len(self.states)


POLICY = SimpleNamespace(prompt_features=lambda condition: torch.zeros(len(condition), 1))


def samples(*sizes: int):
    """Batches whose samples have other positions than their own order, as those of shuffled data."""
    batches = [Trajectory(size, seed) for seed, size in enumerate(sizes)]
    return SimpleNamespace(batches=batches, index=list(torch.arange(sum(sizes)).flip(0).split(sizes)), rewards=torch.zeros(sum(sizes)))


def values_of(values, held, i):
    """V of sample i at the steps with noise."""
    for trajectory, index in zip(held.batches, held.index):
        if i in index.tolist():
            state = trajectory.states[index.tolist().index(i)]
            return [values(state[k][None], torch.zeros(1, 1), torch.tensor([k])).item() for k in (0, 2)]


@pytest.mark.parametrize("lam", [1.0, 0.5])
def test_advantages_and_targets_are_of_the_steps_with_noise(lam):
    held, values = samples(2, 1), ValueBaseline(4, seed=1)
    rewards = torch.tensor([[1.0, NAN, 2.0, NAN], [3.0, NAN, -1.0, NAN], [0.5, NAN, 4.0, NAN]])
    advantages, logged = learned_advantages(values, POLICY, held, rewards, ARGS, 0, lam=lam)
    assert advantages.shape == (3, 4) and not advantages[:, [1, 3]].any()
    assert set(values.buffer[2].tolist()) == {0, 2} and sorted(values.buffer[3].tolist()) == [-1, 2, 2, 3, 4, 4.5], "without a network, what was earned"
    assert 0 < logged["value_error"][0] and logged["explained_variance"][0] == pytest.approx(0.0, abs=0.1)
    # The second epoch: by the network as it is before it is fitted.
    expected, targets = torch.zeros(3, 4), []
    for i, (first, last) in enumerate([(1.0, 2.0), (3.0, -1.0), (0.5, 4.0)]):
        v = values_of(values, held, i)
        later = last - v[1]
        expected[i, 2], expected[i, 0] = later, first + v[1] - v[0] + lam * later
        targets += [later + v[1], expected[i, 0].item() + v[0]]
    advantages, _ = learned_advantages(values, POLICY, held, rewards, ARGS, 1, lam=lam)
    torch.testing.assert_close(advantages, expected)
    assert sorted(values.buffer[3][6:].tolist()) == pytest.approx(sorted(targets), abs=1e-5)


def test_a_final_reward_is_earned_by_each_step_and_one_that_is_no_number_by_none():
    held, values = samples(3), ValueBaseline(4, seed=1)
    advantages, _ = learned_advantages(values, POLICY, held, torch.tensor([1.0, NAN, 2.0]), ARGS, 0)
    assert not advantages[1].any() and sorted(values.buffer[3].tolist()) == [1, 1, 2, 2]
    network = ValueBaseline(4, seed=1)
    network.remember(*values.buffer)  # the same network, not yet fitted
    for i, reward in ((0, 1.0), (2, 2.0)):
        assert advantages[i, [0, 2]].tolist() == pytest.approx([reward - v for v in values_of(network, held, i)])


def test_advantages_are_scaled_over_samples_and_steps_together():
    advantages = torch.tensor([[1.0, 9.0, 3.0], [5.0, 9.0, -1.0]])
    scaled = normalised(advantages, [0, 2], 1.2)
    # of 1, 3, 5 and -1 the mean is 2 and the standard deviation the root of 5
    assert scaled.flatten().tolist() == pytest.approx([-(5**-0.5), 0, 5**-0.5, 1.2, 0, -1.2])
