"""Several steps in one forward: the kernels and gradients of a replay step by step, with fewer denoiser calls, or a sentence."""

import pytest
import torch
from policies import PROMPTS, SEEDS, make
from policies_again import with_momentum
from short_replays import error, replayed

from diffusers_align.driving.forwards import Forwards


@pytest.mark.parametrize("name", ["sd3", "sd15", "flux", "z_image"])
@pytest.mark.parametrize("number", [2, 9])
def test_gradients_are_those_of_single_steps(name, number):
    policy, _, _ = make(name)
    policy.pipeline.to(torch.float64)  # kernels round otherwise for other numbers of rows
    trajectory = policy.rollout(PROMPTS, seeds=SEEDS)
    means, gradient, single = replayed(policy, trajectory)
    replayed(policy, trajectory, Forwards(number))  # which compares, once
    found, joint_gradient, rows = replayed(policy, trajectory, Forwards(number))
    steps = len(trajectory.noisy_steps)
    assert list(found) == trajectory.noisy_steps and steps > 2
    assert len(rows) == len(single) // steps * -(-steps // number) and sum(rows) == sum(single)
    assert max(error(found[k], means[k]) for k in means) < 1e-5
    assert error(joint_gradient, gradient) < 1e-6


def test_some_steps_without_gradients():
    policy, trajectory, _ = make("sd3")
    steps = trajectory.noisy_steps[1:]
    with torch.no_grad():
        means, _, _ = replayed(policy, trajectory, None, steps)
        found, gradient, _ = replayed(policy, trajectory, Forwards(2), steps)
    assert gradient is None and list(found) == steps
    assert max(error(found[k], means[k]) for k in steps) < 1e-5


def test_autocast_keeps_the_gradient():
    """Also where the comparison has cast the weights without a graph before."""
    policy, trajectory, _ = make("sd3")
    found = []
    for forwards in (None, Forwards(2), Forwards(1, unconditional_gradient=True)):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(replayed(policy, trajectory, forwards)[1])
    for gradient in found[1:]:
        assert error(gradient, found[0]) < 0.05


def test_rows_that_know_of_each_other_are_refused():
    policy, trajectory, _ = make("sd3")
    transformer = policy.pipeline.transformer
    forward = transformer.forward

    def mixed(hidden_states, **kwargs):
        return forward(hidden_states - hidden_states.mean(0), **kwargs)

    transformer.forward = mixed
    with pytest.raises(ValueError, match="takes the rows of the steps for one another's.*no --replay_steps_per_forward"):
        policy.replay(trajectory, lambda k, kernel: None, trajectory.noisy_steps, forwards=Forwards(2))


def test_steps_that_hang_together_are_refused():
    policy, _, _ = make("sd15")
    with_momentum(policy)
    trajectory = policy.rollout(PROMPTS, seeds=SEEDS)
    with pytest.raises(ValueError, match="hang together|depends on the denoiser's own answers"):
        policy.replay(trajectory, lambda k, kernel: kernel.mean.sum().backward(), forwards=Forwards(2))


def test_a_denoiser_that_goes_by_its_own_answers_is_refused():
    """Two calls a step, the second at what the first one said: what it will be asked is not known before."""
    policy, trajectory, _ = make("sd3")
    transformer = policy.pipeline.transformer
    ask = type(policy.pipeline.transformer).__call__

    class Twice(type(transformer)):
        def __call__(self, hidden_states, **kwargs):
            first = ask(self, hidden_states, **kwargs)[0]
            return ask(self, hidden_states + first, **kwargs)

    transformer.__class__ = Twice
    trajectory = policy.rollout(PROMPTS, seeds=SEEDS)
    with pytest.raises(ValueError, match="depends on the denoiser's own answers"):
        policy.replay(trajectory, lambda k, kernel: None, forwards=Forwards(2))
