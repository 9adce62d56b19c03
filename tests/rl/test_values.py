"""The learned baseline: a network for the value of state, prompt and step."""

import pytest
import torch
from chain import STEPS, TARGETS, Chain, gradient, perturbed_chain

from diffusers_align.algorithms.dpok import dpok_loss
from diffusers_align.rl.values import ValueBaseline, ValueNetwork, explained_variance, value_advantages, value_targets

# the value network


def toy(number: int, seed: int = 0):
    """Transitions whose value depends on state, prompt and step together."""
    generator = torch.Generator().manual_seed(seed)
    states, prompts = torch.randn(number, 2, 3, generator=generator), torch.randn(number, 4, generator=generator)
    steps = torch.randint(3, (number,), generator=generator)
    sign = torch.tensor([1.0, -1.0, 0.0])[steps]
    return states, prompts, steps, 5 + sign * states[:, 0, 0] + prompts[:, 1]


def fitted(**options) -> ValueBaseline:
    values = ValueBaseline(3, learning_rate=3e-3, batch_size=128, accumulation_steps=1, buffer_size=600, **options)
    values.remember(*toy(600))
    return values


def test_the_network_learns_the_value_of_state_prompt_and_step():
    values = fitted()
    before, after = values.fit(1), values.fit(150)
    states, prompts, steps, rewards = toy(400, seed=1)
    assert before > 0.5 * rewards.var() and after < 0.1 * before
    error = (values(states, prompts, steps) - rewards).square().mean()
    assert error < 0.15 * rewards.var()
    for changed in ((states, prompts, (steps + 1) % 3), (states.flip(0), prompts, steps), (states, prompts.flip(0), steps)):
        assert (values(*changed) - rewards).square().mean() > 4 * error


def test_the_steps_gates_multiply_the_layers():
    torch.manual_seed(0)
    network = ValueNetwork(state_size=6, prompt_size=4, num_steps=3, width=8)
    states, prompts, steps, _ = toy(5)
    assert all(layer.gates.min() >= 0 and layer.gates.max() <= 1 and layer.gates.std() > 0.1 for layer in network.layers)
    x = torch.cat([states.flatten(1), prompts], 1)
    for layer in network.layers:
        x = (layer.linear(x) * torch.stack([layer.gates[k] for k in steps.tolist()])).relu()
    torch.testing.assert_close(network(states, prompts, steps), network.head(x)[:, 0])
    with torch.no_grad():
        network.layers[1].gates[2] = 0.0
        network.layers[2].linear.bias.zero_()
    closed = network(states, prompts, torch.full((5,), 2))
    assert torch.equal(closed, closed[:1].expand(5)) and network(states, prompts, torch.zeros(5, dtype=torch.long)).std() > 0


def test_the_first_forecast_is_near_the_mean_of_the_first_rewards():
    values = ValueBaseline(3)
    states, prompts, steps, rewards = toy(300)
    assert values(states, prompts, steps).tolist() == [0.0] * 300 and values.fit() == 0.0
    values.remember(states, prompts, steps, 100 + rewards)
    assert (values(states, prompts, steps) - 105).abs().max() < 1


def test_the_buffer_keeps_the_latest_and_leaves_out_what_could_not_be_scored():
    values = ValueBaseline(3, buffer_size=4)
    nan = torch.tensor([float("nan")] * 3)
    states, prompts, steps, _ = toy(3)
    values.remember(states, prompts, steps, nan)
    assert values.network is None and values.buffer == []
    for start in (0, 3):
        rewards = torch.arange(start, start + 3.0)
        rewards[1] = float("nan") if start else rewards[1]
        values.remember(states, prompts, steps, rewards)
    assert values.buffer[3].tolist() == [1, 2, 3, 5]
    assert torch.equal(values.buffer[0], states[[1, 2, 0, 2]]) and torch.equal(values.buffer[2], steps[[1, 2, 0, 2]])


def test_minibatches_accumulate_to_one_step_of_their_mean():
    whole, parts = (ValueBaseline(3, batch_size=b, accumulation_steps=n, learning_rate=1e-3) for b, n in ((24, 1), (24, 3)))
    for values in (whole, parts):
        values.remember(*toy(24))
        values.fit()
    # Each minibatch is the whole buffer, so three of them have the gradient of one.
    for mine, theirs in zip(parts.network.parameters(), whole.network.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-4)
    assert parts.optimizer.state_dict()["state"][0]["step"] == 1


def test_training_goes_on_bit_for_bit_from_a_saved_state(tmp_path):
    torch.manual_seed(0)
    whole, random_state = fitted(seed=3), torch.get_rng_state()
    assert torch.equal(random_state, torch.random.manual_seed(0).get_state()), "making the network leaves the global generator alone"
    whole.fit(3)
    torch.save(whole.state_dict(), tmp_path / "values.pt")
    torch.manual_seed(99)
    resumed = ValueBaseline(3, learning_rate=3e-3, batch_size=128, accumulation_steps=1, buffer_size=600, seed=3)
    resumed.load_state_dict(torch.load(tmp_path / "values.pt", weights_only=True))
    for values in (whole, resumed):
        values.remember(*toy(50, seed=2))
        values.fit(3)
    states, prompts, steps, _ = toy(20, seed=5)
    assert torch.equal(whole(states, prompts, steps), resumed(states, prompts, steps))
    assert all(torch.equal(a, b) for a, b in zip(whole.buffer, resumed.buffer))


def test_advantages_and_explained_variance():
    rewards, values = torch.tensor([1.0, 3.0, float("nan")]), torch.tensor([[0.5, 1.0], [2.0, 3.0], [1.0, 1.0]])
    assert value_advantages(rewards, values).tolist() == [[0.5, 0.0], [1.0, 0.0], [0.0, 0.0]]
    # left: 0.5, 0, 1, 0 of variance 0.171875; rewards of variance 1
    assert explained_variance(rewards, values) == pytest.approx(1 - 0.171875)
    assert explained_variance(rewards, torch.full((3, 2), 7.0)) == pytest.approx(0.0)
    assert explained_variance(torch.ones(3), torch.rand(3, 2)) == 0.0


def test_rewards_of_steps_and_the_targets_of_values():
    rewards, values = torch.tensor([[1.0, 2.0], [float("nan"), 4.0]]), torch.tensor([[0.5, 1.0], [2.0, 3.0]])
    assert value_advantages(rewards, values, lam=0.5).tolist() == [[1 + 1 - 0.5 + 0.5 * 1, 1.0], [0.0, 1.0]]
    targets = value_targets(rewards, values, lam=0.5)
    assert targets[0].tolist() == [2.5, 2.0] and targets[1].isnan().tolist() == [True, False] and targets[1, 1] == 4
    assert value_targets(torch.tensor([7.0]), values[:1]).tolist() == [[7.0, 7.0]]
    assert value_targets(torch.tensor([7.0]), values[:1], lam=0.0).tolist() == [[1.0, 7.0]], "of one step: the next state's value"
    # earned 3 and 2, and 4 alone: left are 2.5, 1 and 1
    expected = 1 - torch.tensor([2.5, 1, 1]).var(correction=0) / torch.tensor([3.0, 2, 4]).var(correction=0)
    assert explained_variance(value_targets(rewards, torch.zeros(2, 2)), values) == pytest.approx(expected.item(), rel=1e-6)


# what the baseline is for, on a chain whose values are known in closed form


def exact_values(chain: Chain, states: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """E[r | x_k, c], (N, K): the rest of a linear Gaussian chain has an affine mean and a variance of its own."""
    values = []
    with torch.no_grad():
        for k in range(STEPS):
            mean, variance = states[k], 0.0
            for j in range(k, STEPS):
                transition = chain.transition(j, mean, prompt)
                slope = chain.transition(j, mean + 1, prompt).mean[0, 0] - transition.mean[0, 0]
                mean, variance = transition.mean, slope**2 * variance + transition.std.item() ** 2
            values.append(chain_reward(mean, prompt) - mean.shape[1] * variance)
    return torch.stack(values, 1)


def chain_reward(final: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    return -(final - TARGETS[prompt]).square().sum(1)


def gradients(baseline, repeats=120, number=150) -> torch.Tensor:
    """Gradients of DPOK's surrogate, summed over steps, at ratio 1: one estimate a row."""
    chain, generator, rows = perturbed_chain(), torch.Generator().manual_seed(0), []
    for _ in range(repeats):
        states, old, prompt, rewards = chain.rollout(number, generator)
        advantage = value_advantages(rewards, baseline(chain, states, prompt))
        losses = [
            dpok_loss(chain.transition(k, states[k], prompt).log_prob(states[k + 1]), old[k], advantage[:, k], per_dim=1, reward_weight=1.0, clip_range=0.1)
            for k in range(STEPS)
        ]
        rows.append(-gradient(sum(losses).mean(), chain))
    return torch.stack(rows)


def test_the_expected_reward_as_a_baseline_keeps_the_gradient_and_lowers_its_variance():
    chain = perturbed_chain()
    exact = gradient(chain.objective(), chain)
    learned = gradients(exact_values)
    constant = gradients(lambda chain, states, prompt: chain.objective().detach().expand(states.shape[1], STEPS))
    z = (learned.mean(0) - exact) / (learned.std(0) / len(learned) ** 0.5)
    assert z.abs().max() < 4 and z.square().mean() < 2
    assert learned.var(0).sum() < 0.6 * constant.var(0).sum()


def test_a_value_network_takes_the_place_of_the_expected_reward():
    """Fitted to one chain's transitions, it forecasts others nearly as well as the closed form; trained with it, the chain climbs."""
    chain, generator = perturbed_chain(), torch.Generator().manual_seed(0)
    values = ValueBaseline(STEPS, learning_rate=3e-3, batch_size=256, accumulation_steps=1, buffer_size=8000)

    def transitions(number):
        states, _, prompt, rewards = chain.rollout(number, generator)
        prompts, steps = torch.eye(len(TARGETS))[prompt], torch.arange(STEPS).repeat_interleave(number)
        return states, prompt, rewards, (states[:STEPS].flatten(0, 1), prompts.repeat(STEPS, 1), steps, rewards.repeat(STEPS))

    values.remember(*transitions(2000)[3])
    values.fit(300)
    states, prompt, rewards, (flat, prompts, steps, _) = transitions(2000)
    learned = values(flat.float(), prompts, steps).reshape(STEPS, -1).T.double()
    best = explained_variance(rewards, exact_values(chain, states, prompt))
    assert best > 0.4 and explained_variance(rewards, learned) > 0.85 * best
