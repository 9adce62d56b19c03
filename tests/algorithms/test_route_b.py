"""Reward gradients on a small chain in float64: each method against its formula, against the others, and against autograd."""

import math

import pytest
import torch
from oracles import euler_step, linear_path, states_backwards, states_forwards
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffusers_align import GaussianTransition
from diffusers_align.algorithms import alignprop, draft, drtune, refl, srpo, vader
from diffusers_align.algorithms.continuous_adjoint import adjoint_gradient
from diffusers_align.rl.reward_maps import RewardMap, distance, hinge, shortfall

torch.set_num_threads(1)
STEPS, BATCH, D = 6, 3, 4
SIGMAS = torch.linspace(1, 0, STEPS + 1).tolist()
EXACT = {"rtol": 0, "atol": 1e-12}


class Velocity(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(D + 1, 8), nn.Tanh(), nn.Linear(8, D)).double()

    def forward(self, x, sigma):
        return self.layers(torch.cat([x, torch.full_like(x[:, :1], sigma)], 1))


def noise(seed=1):
    return torch.randn(BATCH, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reward(x):
    return -(x - 1).square().sum(1) + x.prod(1)


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients])


def gradient(loss, model):
    return flat(torch.autograd.grad(loss.sum(), list(model.parameters())))


def chain(model, grad_steps, *, x=None, detach_input=False, call=None, stop_step=None):
    """The final state, by the definition: other calls have no graph, the solver's own arithmetic always has."""
    x, call = noise() if x is None else x, call or model
    for k in range(STEPS):
        with torch.set_grad_enabled(k in grad_steps):
            velocity = call(x.detach() if detach_input else x, SIGMAS[k])
        if k == stop_step:
            return x - SIGMAS[k] * velocity
        x = x + (SIGMAS[k + 1] - SIGMAS[k]) * velocity
    return x


def step_terms(model):
    """Each step's share of the whole gradient: as if each had parameters of its own."""
    copies = [[p.detach().clone().requires_grad_() for p in model.parameters()] for _ in range(STEPS)]
    names, x = [name for name, _ in model.named_parameters()], noise()
    for k in range(STEPS):
        x = x + (SIGMAS[k + 1] - SIGMAS[k]) * torch.func.functional_call(model, dict(zip(names, copies[k])), (x, SIGMAS[k]))
    return [flat(g) for g in zip(*[iter(torch.autograd.grad(reward(x).sum(), [p for c in copies for p in c]))] * len(names))]


def final_gradient(x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(reward(x).sum(), x)[0]


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


@pytest.mark.parametrize("truncation", [1, 3, None])
def test_draft_k_is_the_sum_of_the_last_terms(truncation):
    model, steps = Velocity(), draft.grad_steps(STEPS, truncation)
    actual = gradient(-draft.draft_loss(reward(chain(model, steps))), model)
    torch.testing.assert_close(actual, sum(step_terms(model)[-len(steps) :]), **EXACT)
    assert len(steps) == (truncation or STEPS)


@pytest.mark.parametrize("cut", [0, 2, STEPS - 1])
def test_alignprops_detached_outputs_are_drafts_truncation(cut):
    model, calls = Velocity(), iter(range(STEPS))

    def official(x, sigma):
        velocity = model(x, sigma)
        return velocity.detach() if next(calls) < cut else velocity

    detached = gradient(reward(chain(model, range(STEPS), call=official)), model)
    assert alignprop.grad_steps(STEPS, cut) == draft.grad_steps(STEPS, STEPS - cut)
    torch.testing.assert_close(gradient(reward(chain(model, alignprop.grad_steps(STEPS, cut))), model), detached, **EXACT)


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


def test_refl_is_the_one_step_gradient():
    model, k = Velocity(), refl.middle_step(STEPS, torch.Generator().manual_seed(0))
    rewards = reward(chain(model, [k], stop_step=k))
    x = states_forwards(euler_step(model, SIGMAS), noise(), STEPS)[k]
    clean = x - SIGMAS[k] * model(x, SIGMAS[k])
    inside = (reward(clean).detach() < 2).double()
    expected = flat(torch.autograd.grad(clean, list(model.parameters()), -1e-3 * inside[:, None] * final_gradient(clean)))
    assert inside.any()
    torch.testing.assert_close(gradient(refl.refl_loss(rewards), model), expected, **EXACT)


def test_low_variance_draft_is_the_mean_of_its_gradients():
    model, sigma = Velocity(), SIGMAS[-2]
    x0 = chain(model, draft.grad_steps(STEPS, 1))
    starts = [draft.renoised(x0, noise(10 + j), alpha=1 - sigma, sigma=sigma) for j in range(2)]
    assert not any(start.requires_grad for start in starts)
    samples = [x0, *(x - sigma * model(x, sigma) for x in starts)]
    rewards = [reward(x) for x in samples]
    expected = -sum(flat(torch.autograd.grad(r.sum(), list(model.parameters()), retain_graph=True)) for r in rewards) / 3
    torch.testing.assert_close(gradient(draft.low_variance_loss(rewards), model), expected, **EXACT)


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


# --- which steps ---------------------------------------------------------------------------------------------------------


def drawn(choose, number=2000):
    generator = torch.Generator().manual_seed(0)
    return [choose(generator) for _ in range(number)]


def test_refls_window_is_30_to_39_of_40():
    assert set(drawn(lambda g: refl.middle_step(40, g))) == set(range(30, 40))
    assert set(drawn(lambda g: refl.middle_step(4, g))) == {3}
    assert set(drawn(lambda g: refl.middle_step(1, g), 5)) == {0}
    with pytest.raises(ValueError, match="fractions"):
        refl.middle_step(40, window=(0.9, 0.1))


def test_alignprops_cuts_are_the_official_ones_rescaled():
    """The official loop by hand: a normal draw until it lies in 1 to 49."""
    generator, official = torch.Generator().manual_seed(0), []
    while len(official) < 2000:
        step = int(42 + 5 * float(torch.randn((), generator=generator)))
        official += [step] if 0 < step < 50 else []
    cuts = drawn(lambda g: alignprop.truncation(50, g))
    assert cuts == official
    assert sum(cut == 49 for cut in cuts) / 2000 == pytest.approx(0.027, abs=0.01), "a clamp would make it 8%"
    assert 50 - sum(cuts) / 2000 == pytest.approx(9.10, abs=0.3)
    assert drawn(lambda g: alignprop.truncation(10, g)) == [cut // 5 for cut in official]


def test_alignprops_other_cuts():
    assert set(drawn(lambda g: alignprop.truncation(5, g, strategy="uniform"))) == {1, 2, 3, 4}
    assert set(drawn(lambda g: alignprop.truncation(4, g, mean=1.0, std=1.0))) == {1}, "the first step has no gradient on short chains either"
    assert alignprop.truncation(50, strategy="fixed") == 49 and alignprop.truncation(25, strategy="fixed") == 24
    assert alignprop.truncation(10, strategy="fixed", fixed=0) == 0
    assert [alignprop.truncation(1, strategy=strategy) for strategy in alignprop.STRATEGIES] == [0, 0, 0]
    for options, match in (
        ({"strategy": "sometimes"}, "strategy"),
        ({"strategy": "fixed", "fixed": 50}, "fixed cut"),
        ({"mean": 60.0, "std": 0.0}, "gave no step"),
    ):
        with pytest.raises(ValueError, match=match):
            alignprop.truncation(50, **options)


def test_a_seed_fixes_the_choice():
    for choose in (lambda g: refl.middle_step(40, g), lambda g: alignprop.truncation(50, g), lambda g: tuple(drtune.grad_steps(50, g, skip_last_steps=9)[0])):
        assert drawn(choose, 20) == drawn(choose, 20)
        assert len(set(drawn(choose, 20))) > 1


def test_vaders_steps_and_frames():
    assert vader.grad_steps(50) == [49]
    assert vader.grad_steps(50, mode="specific") == list(range(15, 50))
    assert vader.grad_steps(10, mode="specific") == list(range(3, 10))
    assert {min(steps) for steps in drawn(lambda g: vader.grad_steps(4, g, mode="random"), 200)} == set(range(4))
    assert {tuple(f) for f in drawn(lambda g: vader.frame_indices(3, g), 100)} == {(0,), (1,), (2,)}
    assert vader.frame_indices(9, mode="ends") == [0, 4, 8] and vader.frame_indices(1, mode="ends") == [0]
    assert vader.frame_indices(5, mode="alternate") == [0, 2, 4] and vader.frame_indices(3, mode="all") == [0, 1, 2]
    for choose in (vader.grad_steps, vader.frame_indices):
        with pytest.raises(ValueError, match="mode"):
            choose(5, mode="never")


def test_drtunes_steps_are_evenly_spaced_and_end_before_the_stop():
    choices = drawn(lambda g: drtune.grad_steps(50, g, number=5, skip_last_steps=10), 500)
    assert {stop for _, stop in choices} == set(range(39, 50))
    for steps, stop in choices:
        assert len(steps) == 5 and 0 <= steps[0] and steps[-1] <= stop
        assert {b - a for a, b in zip(steps, steps[1:])} == {(stop + 1) // 5}
    assert {steps[0] for steps, _ in choices} >= set(range(8))
    with pytest.raises(ValueError, match="number"):
        drtune.grad_steps(5, number=5, skip_last_steps=1)


def test_drafts_truncation_is_checked():
    with pytest.raises(ValueError, match="truncation"):
        draft.grad_steps(5, 6)


# --- losses --------------------------------------------------------------------------------------------------------------


def test_reward_maps():
    r = torch.tensor([-1.0, 2.0, 5.0], dtype=torch.float64, requires_grad=True)
    assert hinge(r, margin=2.0).tolist() == [3.0, 0.0, 0.0]
    assert distance(r, target=3.0).tolist() == [4.0, 1.0, 2.0]
    assert shortfall(r).tolist() == [2.0, -1.0, -4.0]
    assert refl.refl_loss(r).tolist() == pytest.approx([3e-3, 0, 0])
    assert refl.refl_loss(r, RewardMap("hinge", 5.0, 1.0)).tolist() == [6.0, 3.0, 0.0]
    assert alignprop.alignprop_loss(r).tolist() == pytest.approx([0.02, -0.01, -0.04])
    assert vader.vader_loss(r).tolist() == [2.0, 1.0, 4.0]
    assert draft.draft_loss(r).tolist() == [1.0, -2.0, -5.0]
    assert draft.low_variance_loss([r, 2 * r, 3 * r], RewardMap("hinge", 3.0)).tolist() == pytest.approx([5.0, 0.0 + 1 / 3, 0.0])


def test_reward_maps_as_values():
    r = torch.tensor([-1.0, 2.0, torch.nan], dtype=torch.float64)
    values = {"none": [1.0, -2.0], "hinge": [2.0, 0.0], "distance": [2.0, 1.0], "shortfall": [2.0, -1.0]}
    for form, expected in values.items():
        mapped = RewardMap(form, None if form == "none" else 1.0, scale=0.5)(r)
        assert mapped[:2].tolist() == [0.5 * e for e in expected] and mapped[2].isnan()
    for form, target, match in (("hinges", 1.0, "Unknown"), ("hinge", None, "needs a target"), ("none", 1.0, "has no target")):
        with pytest.raises(ValueError, match=match):
            RewardMap(form, target)


def test_deviation_is_the_kl_where_there_is_noise_and_the_squared_error_elsewhere():
    mean, ref_mean, std = noise(3), noise(4), torch.full((1, 1), 0.5, dtype=torch.float64)
    kernels = GaussianTransition(mean, std), GaussianTransition(ref_mean, std)
    expected = ((mean - ref_mean).square() / (2 * 0.25)).sum(1)
    torch.testing.assert_close(draft.deviation(mean, ref_mean, *kernels, per_dim=1), expected, **EXACT)
    torch.testing.assert_close(draft.deviation(mean, ref_mean, *kernels, per_dim=D), expected / D, **EXACT)
    torch.testing.assert_close(draft.deviation(mean, ref_mean, per_dim=1), (mean - ref_mean).square().mean(1), **EXACT)


# --- SRPO ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma, sigma_next", [(0.9, 0.7), (0.5, 0.0), (0.4, 0.6)])
def test_the_recovered_sample_is_the_official_formula(sigma, sigma_next):
    x0, eps, velocity = noise(1), noise(2), noise(3)
    x = (1 - sigma) * x0 + sigma * eps
    expected = (x + (sigma_next - sigma) * velocity - sigma_next * eps) / (1 - sigma_next)
    torch.testing.assert_close(srpo.recovered_sample(x0, eps, velocity, sigma=sigma, sigma_next=sigma_next), expected, **EXACT)
    perfect = srpo.recovered_sample(x0, eps, eps - x0, sigma=sigma, sigma_next=sigma_next)
    torch.testing.assert_close(perfect, x0, **EXACT)


def test_nothing_is_recovered_from_pure_noise():
    with pytest.raises(ValueError, match="pure noise"):
        srpo.recovered_sample(noise(), noise(), noise(), sigma=0.9, sigma_next=1.0)


def test_the_two_branches_move_the_model_alike():
    x0, eps = noise(1), noise(2)
    gradients = []
    for sigma_next, sign in ((0.4, 1.0), (0.6, -1.0)):
        velocity = noise(3).requires_grad_()
        recovered = srpo.recovered_sample(x0, eps, velocity, sigma=0.5, sigma_next=sigma_next)
        gradients.append(torch.autograd.grad((sign * recovered.sum(1)).sum(), velocity)[0])
    assert (gradients[0] * gradients[1] > 0).all()


def test_semantic_relative_preference():
    """Of cosines it is the paper's product with the difference of the two texts' embeddings."""
    image, wanted, unwanted = (nn.functional.normalize(noise(seed), dim=1) for seed in (1, 2, 3))
    expected = (image * (1.2 * wanted - unwanted)).sum(1)
    cosines = (image * wanted).sum(1), (image * unwanted).sum(1)
    torch.testing.assert_close(srpo.semantic_relative_preference(*cosines, 0.2), expected, **EXACT)
    assert srpo.semantic_relative_preference(cosines[0], cosines[0], 0.0).abs().max() == 0
    assert srpo.srpo_loss(torch.tensor([0.2, 0.9]), torch.tensor([0.6, 0.1])).tolist() == pytest.approx([0.6, 0.6])


# (noise level, discount) of the official code, run at its levels: entries 5 to 25 of a schedule of 50 steps with shift 3.
OFFICIAL_DISCOUNTS = {False: [(0.964, 0.244), (0.878, 0.176), (0.769, 0.108)], True: [(0.943, 0.036), (0.834, 0.183), (0.750, 0.297)]}


@pytest.mark.parametrize("inversion", [False, True])
def test_srpos_discounts_belong_to_the_official_noise_levels(inversion):
    """Large at much noise, and small there for the inversion. Its step begins in between the levels, hence the tolerance."""
    found = srpo.discounts(21, inversion=inversion)
    assert found[[0, -1]].tolist() == pytest.approx([0.01, 0.3] if inversion else [0.25, 0.1])
    for sigma, discount in OFFICIAL_DISCOUNTS[inversion]:
        place = 50 * (1 - sigma / (3 - 2 * sigma)) - 5  # of the shifted level among the 21
        assert float(found[round(place)]) == pytest.approx(discount, abs=0.03 if inversion else 0.01)
