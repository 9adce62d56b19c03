"""The rows without the prompt are found by what they count for, and leave the gradient that of guidance with that half held constant."""

import pytest
import torch
from policies import make
from short_replays import error, replayed

from diffusers_align.driving import unconditional
from diffusers_align.driving.forwards import Forwards
from diffusers_align.driving.unconditional import _negative, held_rows

GUIDED = {"sd3": {"guidance_scale": 4.0}, "sd15": {"guidance_scale": 4.0}, "wan": {"guidance_scale": 4.0}}


def by_hand(policy, trajectory, first_half):
    """The gradient where the half of the rows without the prompt is detached behind the denoiser."""

    def detached(forward, *args, **kwargs):
        output = forward(*args, **kwargs)
        half = len(output[0]) // 2
        parts = (output[0][:half].detach(), output[0][half:]) if first_half else (output[0][:half], output[0][half:].detach())
        return (torch.cat(parts),)

    with policy.denoising(detached):
        return replayed(policy, trajectory)[1]


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("name", ["sd3", "sd15"])
def test_the_gradient_is_that_of_a_detached_half(name, number):
    policy, trajectory, _ = make(name, **GUIDED[name])
    means, whole, rows = replayed(policy, trajectory)
    expected = by_hand(policy, trajectory, first_half=True)
    forwards = Forwards(number, unconditional_gradient=False)
    replayed(policy, trajectory, forwards)
    found, gradient, apart = replayed(policy, trajectory, forwards)
    assert error(gradient, expected) < 1e-6
    assert error(whole, expected) > 0.1  # it is another gradient
    assert sum(apart) == sum(rows)
    assert max(error(found[k], means[k]) for k in means) < 1e-5


def test_a_call_of_their_own_has_no_gradient():
    """Where the two halves are two calls, the one without the prompt is left out of the graph."""
    policy, trajectory, _ = make("wan", **GUIDED["wan"])
    held = held_rows(policy, trajectory, trajectory.noisy_steps, trajectory.condition)
    assert held == {(k, 1): [0, 1, 2, 3] for k in trajectory.noisy_steps}
    graphs = []

    def seen(forward, *args, **kwargs):
        output = forward(*args, **kwargs)
        graphs.append(output[0].requires_grad)
        return output

    with policy.denoising(seen):
        replayed(policy, trajectory, Forwards(1, unconditional_gradient=False))
    assert graphs == [True, False] * len(trajectory.noisy_steps)


def test_what_is_found_is_remembered(monkeypatch):
    policy, trajectory, _ = make("sd3", **GUIDED["sd3"])
    size = len(trajectory)
    held = held_rows(policy, trajectory, [0, 1], trajectory.condition)
    assert held == {(0, 0): list(range(size)), (1, 0): list(range(size))}  # the first half
    monkeypatch.setattr(unconditional, "_look", None)
    assert held_rows(policy, trajectory, [1], trajectory.condition) == {(1, 0): list(range(size))}


def test_a_call_without_guidance_is_refused():
    policy, trajectory, _ = make("sd3", guidance_scale=1.0)
    with pytest.raises(ValueError, match="not guided, or by a scale of at most 1.*--no-unconditional_gradient"):
        replayed(policy, trajectory, Forwards(1, unconditional_gradient=False))


def test_rescaled_guidance_has_its_rows():
    """Its scale depends on the outputs, and the sign of what each row counts does not."""
    policy, trajectory, _ = make("sd15", guidance_scale=4.0, guidance_rescale=0.7)
    gradient = replayed(policy, trajectory, Forwards(1, unconditional_gradient=False))[1]
    assert error(gradient, by_hand(policy, trajectory, first_half=True)) < 1e-6


def test_rows_that_count_both_ways_are_refused():
    assert _negative("Some", torch.tensor([[-3.0, -2.0], [4.0, 4.0]]), 3.0) == [0]
    assert _negative("Some", torch.tensor([[-3.0, -2.0], [4.0, 4.0]]), -3.0) == [1]  # the mean falls with the output
    with pytest.raises(ValueError, match="Some has no rows .* no weighted sum"):
        _negative("Some", torch.tensor([[-3.0, 2.0], [4.0, 4.0]]), 3.0)


def test_without_gradients_nothing_is_looked_for():
    policy, trajectory, _ = make("sd3", guidance_scale=1.0)
    with torch.no_grad():
        policy.replay(trajectory, lambda k, kernel: None, forwards=Forwards(1, unconditional_gradient=False))
