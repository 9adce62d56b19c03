"""The adjoint of the sampling ODE against autograd and closed forms."""

import math

import pytest
import torch
from oracles import euler_step, states_backwards, states_forwards
from torch.utils.checkpoint import checkpoint
from velocity_chain import EXACT, SIGMAS, STEPS, D, Velocity, chain, final_gradient, flat, gradient, noise, reward, step_terms

from diffusers_align.algorithms.continuous_adjoint import adjoint_gradient

# --- the chain's gradient, four ways -------------------------------------------------------------------------------------


def test_autograd_checkpointing_and_the_discrete_adjoint_agree():
    model = Velocity()
    plain = gradient(reward(chain(model, range(STEPS))), model)
    recomputed = gradient(reward(chain(model, range(STEPS), call=lambda x, s: checkpoint(model, x, s, use_reentrant=False))), model)
    step = euler_step(model, SIGMAS)
    states = states_forwards(step, noise(), STEPS)
    adjoint = adjoint_gradient(step, states, final_gradient(states[-1]), list(model.parameters()))
    torch.testing.assert_close(recomputed, plain, rtol=0, atol=0)
    torch.testing.assert_close(flat(adjoint.gradients), plain, **EXACT)
    torch.testing.assert_close(sum(step_terms(model)), plain, **EXACT)
    assert adjoint.mismatch == 0 and adjoint.norms.shape == (STEPS + 1,)


def test_the_adjoint_at_the_noise_is_its_gradient():
    model, start = Velocity(), noise().requires_grad_()
    expected = torch.autograd.grad(reward(chain(model, range(STEPS), x=start)).sum(), start)[0]
    step = euler_step(model, SIGMAS)
    states = states_forwards(step, start.detach(), STEPS)
    adjoint = adjoint_gradient(step, states, final_gradient(states[-1]), list(model.parameters()))
    torch.testing.assert_close(adjoint.state, expected, **EXACT)
    torch.testing.assert_close(adjoint.norms[0], expected.norm(), **EXACT)


# --- the continuous adjoint ----------------------------------------------------------------------------------------------


def linear_adjoint(steps):
    """Relative errors for dx = A x dsigma, sigma from 1 to 0: of the adjoint at the noise, and of the gradient with respect to A."""
    generator = torch.Generator().manual_seed(0)
    matrix = (0.5 * torch.randn(D, D, generator=generator, dtype=torch.float64)).requires_grad_()
    start, final = noise(), noise(2)
    sigmas = torch.linspace(1, 0, steps + 1).tolist()
    step = euler_step(lambda x, sigma: x @ matrix.T, sigmas)
    result = adjoint_gradient(step, states_forwards(step, start, steps), final, [matrix])
    exact = final @ torch.linalg.matrix_exp(-matrix.detach())
    matrix_gradient = torch.autograd.grad((final * (start @ torch.linalg.matrix_exp(-matrix).T)).sum(), matrix)[0]
    return [float((a - b).norm() / b.norm()) for a, b in ((result.state, exact), (result.gradients[0], matrix_gradient))]


def test_the_adjoint_of_a_linear_ode_is_a_matrix_exponential_to_first_order():
    errors = [linear_adjoint(steps) for steps in (40, 80, 160)]
    for coarse, fine in zip(errors, errors[1:]):
        for a, b in zip(coarse, fine):
            assert 0.9 < math.log2(a / b) < 1.1
    assert max(errors[-1]) < 0.05


def backwards_error(model, steps):
    sigmas = torch.linspace(1, 0, steps + 1).tolist()
    step, parameters = euler_step(model, sigmas), list(model.parameters())
    states = states_forwards(step, noise(), steps)
    exact = adjoint_gradient(step, states, final_gradient(states[-1]), parameters)
    back = adjoint_gradient(step, states_backwards(model, states[-1], sigmas), final_gradient(states[-1]), parameters, tolerance=None)
    return float((flat(back.gradients) - flat(exact.gradients)).norm() / flat(exact.gradients).norm()), back.mismatch


def test_states_integrated_backwards_cost_accuracy_and_say_so():
    model = Velocity()
    errors = [backwards_error(model, steps) for steps in (10, 20, 40)]
    for (coarse, coarse_mismatch), (fine, fine_mismatch) in zip(errors, errors[1:]):
        assert 1.5 < coarse / fine < 3, "first order in the step"
        assert 3 < coarse_mismatch / fine_mismatch < 6, "second order for each step"
    assert errors[0][0] > 1e-4


def test_a_step_that_leads_elsewhere_is_refused():
    model = Velocity()
    step = euler_step(model, SIGMAS)
    states = states_forwards(step, noise(), STEPS)
    with pytest.raises(ValueError, match="one-step solver"):
        adjoint_gradient(step, [*states[:-1], states[-1] + 0.1], noise(), list(model.parameters()))


def test_parameters_without_influence_have_the_gradient_zero():
    unused = torch.ones(2, dtype=torch.float64, requires_grad=True)
    step = euler_step(Velocity(), SIGMAS)
    result = adjoint_gradient(step, states_forwards(step, noise(), STEPS), noise(), [unused])
    assert torch.equal(result.gradients[0], torch.zeros_like(unused))
