"""DRaFT: the sum of the last terms, and its low-variance form."""

import pytest
import torch
from velocity_chain import EXACT, SIGMAS, STEPS, D, Velocity, chain, drawn, flat, gradient, noise, reward, step_terms

from diffusers_align import GaussianTransition
from diffusers_align.algorithms import alignprop, draft, drtune, refl

# --- the chain's gradient, four ways -------------------------------------------------------------------------------------


@pytest.mark.parametrize("truncation", [1, 3, None])
def test_draft_k_is_the_sum_of_the_last_terms(truncation):
    model, steps = Velocity(), draft.grad_steps(STEPS, truncation)
    actual = gradient(-draft.draft_loss(reward(chain(model, steps))), model)
    torch.testing.assert_close(actual, sum(step_terms(model)[-len(steps) :]), **EXACT)
    assert len(steps) == (truncation or STEPS)


def test_low_variance_draft_is_the_mean_of_its_gradients():
    model, sigma = Velocity(), SIGMAS[-2]
    x0 = chain(model, draft.grad_steps(STEPS, 1))
    starts = [draft.renoised(x0, noise(10 + j), alpha=1 - sigma, sigma=sigma) for j in range(2)]
    assert not any(start.requires_grad for start in starts)
    samples = [x0, *(x - sigma * model(x, sigma) for x in starts)]
    rewards = [reward(x) for x in samples]
    expected = -sum(flat(torch.autograd.grad(r.sum(), list(model.parameters()), retain_graph=True)) for r in rewards) / 3
    torch.testing.assert_close(gradient(draft.low_variance_loss(rewards), model), expected, **EXACT)


# --- which steps ---------------------------------------------------------------------------------------------------------


def test_a_seed_fixes_the_choice():
    for choose in (lambda g: refl.middle_step(40, g), lambda g: alignprop.truncation(50, g), lambda g: tuple(drtune.grad_steps(50, g, skip_last_steps=9)[0])):
        assert drawn(choose, 20) == drawn(choose, 20)
        assert len(set(drawn(choose, 20))) > 1


def test_drafts_truncation_is_checked():
    with pytest.raises(ValueError, match="truncation"):
        draft.grad_steps(5, 6)


# --- losses --------------------------------------------------------------------------------------------------------------


def test_deviation_is_the_kl_where_there_is_noise_and_the_squared_error_elsewhere():
    mean, ref_mean, std = noise(3), noise(4), torch.full((1, 1), 0.5, dtype=torch.float64)
    kernels = GaussianTransition(mean, std), GaussianTransition(ref_mean, std)
    expected = ((mean - ref_mean).square() / (2 * 0.25)).sum(1)
    torch.testing.assert_close(draft.deviation(mean, ref_mean, *kernels, per_dim=1), expected, **EXACT)
    torch.testing.assert_close(draft.deviation(mean, ref_mean, *kernels, per_dim=D), expected / D, **EXACT)
    torch.testing.assert_close(draft.deviation(mean, ref_mean, per_dim=1), (mean - ref_mean).square().mean(1), **EXACT)
