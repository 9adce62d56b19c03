"""DRTune: the linear path and its steps."""

import pytest
import torch
from oracles import euler_step, linear_path, states_forwards
from velocity_chain import EXACT, SIGMAS, STEPS, Velocity, chain, drawn, final_gradient, flat, gradient, noise, reward

from diffusers_align.algorithms import drtune

# --- the chain's gradient, four ways -------------------------------------------------------------------------------------


def test_drtune_is_the_linear_path():
    model, (steps, _) = Velocity(), drtune.grad_steps(STEPS, torch.Generator().manual_seed(0), number=3)
    actual = gradient(reward(chain(model, steps, detach_input=True)), model)
    weights = linear_path([1.0] * STEPS, [b - a for a, b in zip(SIGMAS, SIGMAS[1:])])
    states = states_forwards(euler_step(model, SIGMAS), noise(), STEPS)
    a = final_gradient(states[-1])
    expected = sum(flat(torch.autograd.grad(model(states[k], SIGMAS[k]), list(model.parameters()), weights[k] * a)) for k in steps)
    torch.testing.assert_close(actual, expected, **EXACT)
    assert not torch.allclose(actual, gradient(reward(chain(model, steps)), model))


def test_the_linear_path_of_a_solver_that_shrinks_the_state():
    state_weights, output_weights = [0.9, 0.8, 0.5], [2.0, 3.0, 4.0]
    outputs = [torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(3)]
    x = torch.ones((), dtype=torch.float64)
    for a, b, output in zip(state_weights, output_weights, outputs):
        x = a * x + b * output
    expected = [float(g) for g in torch.autograd.grad(x, outputs)]
    assert linear_path(state_weights, output_weights) == pytest.approx(expected, abs=1e-12)


# --- which steps ---------------------------------------------------------------------------------------------------------


def test_drtunes_steps_are_evenly_spaced_and_end_before_the_stop():
    choices = drawn(lambda g: drtune.grad_steps(50, g, number=5, skip_last_steps=10), 500)
    assert {stop for _, stop in choices} == set(range(39, 50))
    for steps, stop in choices:
        assert len(steps) == 5 and 0 <= steps[0] and steps[-1] <= stop
        assert {b - a for a, b in zip(steps, steps[1:])} == {(stop + 1) // 5}
    assert {steps[0] for steps, _ in choices} >= set(range(8))
    with pytest.raises(ValueError, match="number"):
        drtune.grad_steps(5, number=5, skip_last_steps=1)
