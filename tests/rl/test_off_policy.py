"""Importance sampling: expectations over all episodes, added up."""

from itertools import product

import pytest
import torch
from mutants import assert_mutants_fail

from diffusers_align.rl.mdp import FiniteMDP
from diffusers_align.rl.off_policy import ordinary_estimate, per_decision_estimate, weighted_estimate

GAMMA = 0.8


def every_episode():
    """All of three steps with two actions: probability under the behaviour, ratios, rewards; and both policies' values of the first state."""
    generator = torch.Generator().manual_seed(0)
    mdp = FiniteMDP(torch.randn(2, 2, 2, generator=generator, dtype=torch.float64).softmax(-1), torch.randn(2, 2, generator=generator, dtype=torch.float64))
    target = torch.tensor([[0.9, 0.1], [0.3, 0.7]], dtype=torch.float64)
    behaviour = torch.tensor([[0.4, 0.6], [0.5, 0.5]], dtype=torch.float64)
    probability, ratios, rewards = [], [], []
    for actions in product(range(2), repeat=3):
        for following in product(range(2), repeat=3):
            states = (0, *following[:2])
            p = torch.stack([behaviour[s, a] * mdp.transition[s, a, t] for s, a, t in zip(states, actions, following)])
            probability.append(p.prod())
            ratios.append(torch.stack([target[s, a] / behaviour[s, a] for s, a in zip(states, actions)]))
            rewards.append(torch.stack([mdp.reward[s, a] for s, a in zip(states, actions)]))

    def value(policy):
        worth = torch.zeros(2, dtype=torch.float64)
        for _ in range(3):
            worth = (policy * (mdp.reward + GAMMA * mdp.transition @ worth)).sum(1)
        return worth[0].item()

    return torch.stack(probability), torch.stack(ratios), torch.stack(rewards), value(target), value(behaviour)


PROBABILITY, RATIOS, REWARDS, VALUE, BEHAVIOUR_VALUE = every_episode()


def moments(estimate, number=1):
    """Mean and variance of an estimate from `number` episodes, over all ways to draw them."""
    mean = square = 0.0
    for chosen in product(range(len(PROBABILITY)), repeat=number):
        p = PROBABILITY[list(chosen)].prod().item()
        found = estimate(RATIOS[list(chosen)], REWARDS[list(chosen)], discount=GAMMA).item()
        mean, square = mean + p * found, square + p * found**2
    return mean, square - mean**2


@pytest.mark.parametrize("estimate", [ordinary_estimate, per_decision_estimate])
def test_unbiased_estimates(estimate):
    def check(f):
        assert moments(f)[0] == pytest.approx(VALUE, abs=1e-12)
        # Two episodes and one agree in the mean, as a sum would not.
        both = f(RATIOS[:2], REWARDS[:2], discount=GAMMA)
        assert both.item() == pytest.approx((f(RATIOS[:1], REWARDS[:1], discount=GAMMA) + f(RATIOS[1:2], REWARDS[1:2], discount=GAMMA)).item() / 2)

    mutations = {"ordinary_estimate": {"ratios.prod(1) * ": "", ".mean()": ".sum()", ", discount)": ", 1.0)"}}
    mutations["per_decision_estimate"] = {"cumprod(1) * ": "cumprod(1) * 2 * ", "* discounts(rewards, discount)": "", "ratios.cumprod(1)": "ratios"}
    assert_mutants_fail(check, estimate, mutations[estimate.__name__])


def test_per_decision_has_less_variance_than_ordinary_here():
    assert moments(per_decision_estimate)[1] < 0.8 * moments(ordinary_estimate)[1]


def test_the_weighted_estimate_begins_at_the_behaviour_and_nears_the_target():
    def check(f):
        assert moments(f)[0] == pytest.approx(BEHAVIOUR_VALUE, abs=1e-12), "of one episode it is the return, whatever the weight"
        two = moments(f, 2)[0]
        assert abs(two - VALUE) < 0.9 * abs(BEHAVIOUR_VALUE - VALUE)
        whole = f(RATIOS.repeat_interleave(3, 0), REWARDS.repeat_interleave(3, 0), discount=GAMMA).item()
        weights = RATIOS.prod(1)
        returns = REWARDS @ torch.tensor([1, GAMMA, GAMMA**2], dtype=torch.float64)
        assert whole == pytest.approx(((weights * returns).sum() / weights.sum()).item())
        assert returns.min() <= whole <= returns.max()
        assert f(torch.zeros(2, 3), REWARDS[:2]).item() == 0.0

    mutations = {
        "(weights * _returns": "(_returns",
        "total.where(total > 0, 1.0)": "len(weights)",
        "rewards, discount)": "rewards, 1.0)",
        "total > 0, (": "total < 0, (",
    }
    assert_mutants_fail(check, weighted_estimate, mutations)
    assert moments(weighted_estimate)[1] < moments(ordinary_estimate)[1]
