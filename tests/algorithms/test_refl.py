"""ReFL: the gradient of one step, and which."""

import pytest
import torch
from oracles import euler_step, states_forwards
from velocity_chain import EXACT, SIGMAS, STEPS, Velocity, chain, drawn, final_gradient, flat, gradient, noise, reward

from diffusers_align.algorithms import refl

# --- the chain's gradient, four ways -------------------------------------------------------------------------------------


def test_refl_is_the_one_step_gradient():
    model, k = Velocity(), refl.middle_step(STEPS, torch.Generator().manual_seed(0))
    rewards = reward(chain(model, [k], stop_step=k))
    x = states_forwards(euler_step(model, SIGMAS), noise(), STEPS)[k]
    clean = x - SIGMAS[k] * model(x, SIGMAS[k])
    inside = (reward(clean).detach() < 2).double()
    expected = flat(torch.autograd.grad(clean, list(model.parameters()), -1e-3 * inside[:, None] * final_gradient(clean)))
    assert inside.any()
    torch.testing.assert_close(gradient(refl.refl_loss(rewards), model), expected, **EXACT)


# --- which steps ---------------------------------------------------------------------------------------------------------


def test_refls_window_is_30_to_39_of_40():
    assert set(drawn(lambda g: refl.middle_step(40, g))) == set(range(30, 40))
    assert set(drawn(lambda g: refl.middle_step(4, g))) == {3}
    assert set(drawn(lambda g: refl.middle_step(1, g), 5)) == {0}
    with pytest.raises(ValueError, match="fractions"):
        refl.middle_step(40, window=(0.9, 0.1))
