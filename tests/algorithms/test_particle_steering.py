"""Resampling, potentials and evidence, against closed forms and against quadrature of the same discrete chain."""

import dataclasses
import math

import pytest
import torch

from diffusers_align import FlowMatchSDEScheduler
from diffusers_align.algorithms import particle_steering as smc
from diffusers_align.algorithms.particle_steering import (
    POTENTIALS,
    RESAMPLERS,
    ancestors,
    effective_particles,
    initial_weights,
    log_evidence,
    proposal_log_ratio,
    resample,
    reweight,
    twist,
)

STEPS, PARTICLES, RUNS = 16, 8, 4000
CENTRES, SPREADS, SHARES = torch.tensor([-0.8, 0.9]).double(), torch.tensor([0.4, 0.3]).double(), torch.tensor([0.6, 0.4]).double()
SCALE, WANTED = 1.5, 1.4


def uniforms(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the chain: Flow-GRPO's kernels on the exact velocity of a mixture of two Gaussians -----------------------------------


def kernels():
    scheduler = FlowMatchSDEScheduler(shift=1.0, noise_level=0.7)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / STEPS, STEPS).tolist())
    assert scheduler.stochastic_steps.all()
    return scheduler.sigmas.double().tolist(), [scheduler.kernel(k) for k in range(STEPS)]


SIGMAS, KERNELS = kernels()


def clean(x, sigma):
    """E[x0 | x] for the mixture, in closed form."""
    variance = ((1 - sigma) * SPREADS).square() + sigma**2
    shares = (SHARES.log() - 0.5 * variance.log() - (x[..., None] - (1 - sigma) * CENTRES).square() / (2 * variance)).softmax(-1)
    posterior = CENTRES + (1 - sigma) * SPREADS.square() / variance * (x[..., None] - (1 - sigma) * CENTRES)
    return (shares * posterior).sum(-1)


def kernel_mean(x, k):
    return KERNELS[k].x_weight * x + KERNELS[k].v_weight * (x - clean(x, SIGMAS[k])) / SIGMAS[k]


def reward(x):
    return -0.5 * (x - WANTED).square()


def exact():
    """Z and the tilt's mean of the discrete chain: its density on a grid, step by step."""
    grid = torch.linspace(-6, 6, 1601, dtype=torch.float64)
    width = grid[1] - grid[0]
    density = torch.exp(-grid.square() / 2) / math.sqrt(2 * math.pi)
    for k, kernel in enumerate(KERNELS):
        moves = torch.exp(-0.5 * ((grid[:, None] - kernel_mean(grid, k)) / kernel.std).square()) / (kernel.std * math.sqrt(2 * math.pi))
        density = moves @ density * width
    assert abs(float(density.sum() * width) - 1) < 1e-6
    tilted = density * torch.exp(SCALE * reward(grid))
    evidence = float(tilted.sum() * width)
    return evidence, float((tilted * grid).sum() * width / evidence), float((density * grid).sum() * width)


EVIDENCE, TILTED_MEAN, BASE_MEAN = exact()


def run(*, method="systematic", twisted=False, threshold=0.5, potential="difference", resample=resample, particles=PARTICLES, weighed=range(1, STEPS), seed=0):
    """`RUNS` independent runs, weighed at these steps (all if twisted): the evidence's estimates and the weighted means of x, (RUNS,) each."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(RUNS, particles, generator=generator, dtype=torch.float64)
    weights, log_ratio = initial_weights(RUNS, particles), None
    for k, kernel in enumerate(KERNELS):
        std = torch.tensor(kernel.std, dtype=torch.float64)
        x = x.requires_grad_(twisted)
        values = reward(clean(x, SIGMAS[k]))
        gradient = torch.autograd.grad(SCALE * values.sum(), x)[0] if twisted else torch.zeros_like(x)
        if k in weighed:
            weights = reweight(weights, values.detach(), potential=potential, reward_scale=SCALE, log_ratio=log_ratio)
            draws = torch.rand(RUNS, particles, generator=generator, dtype=torch.float64)
            weights, index = resample(weights, draws, method=method, ess_threshold=threshold)
            x, gradient = x.gather(1, index), gradient.gather(1, index)
        x = x.detach()
        mean = kernel_mean(x, k)
        proposal = twist(mean, std, gradient)
        x = proposal + std * torch.randn(RUNS, particles, generator=generator, dtype=torch.float64)
        log_ratio = proposal_log_ratio(x.flatten()[:, None], mean.flatten()[:, None], proposal.flatten()[:, None], std).reshape(x.shape)
    weights = reweight(weights, reward(x), reward_scale=SCALE, log_ratio=log_ratio, last=True)
    return log_evidence(weights).exp(), (weights.log_weight.softmax(1) * x).sum(1)


def z_score(values, expected):
    return float((values.mean() - expected) / (values.std() / len(values) ** 0.5))


# --- evidence and tilt ----------------------------------------------------------------------------------------------------


def test_the_tilt_of_this_chain_is_far_from_its_base():
    assert TILTED_MEAN - BASE_MEAN > 0.7


@pytest.mark.parametrize("threshold", [0.5, 1.0], ids=["adaptive", "always"])
@pytest.mark.parametrize("twisted", [False, True], ids=["bootstrap", "twisted"])
@pytest.mark.parametrize("method", RESAMPLERS)
def test_evidence_and_tilt_are_unbiased(method, twisted, threshold):
    evidence, mean = run(method=method, twisted=twisted, threshold=threshold)
    assert abs(z_score(evidence, EVIDENCE)) < 4
    assert abs(z_score(evidence * mean, EVIDENCE * TILTED_MEAN)) < 4
    assert evidence.std() < EVIDENCE  # the estimate says something


@pytest.mark.parametrize("threshold", [0.5, 1.0])
@pytest.mark.parametrize("potential", ["max", "add"])
def test_every_potential_targets_the_same_tilt(potential, threshold):
    # Sums of rewards tilt far too much on the way: weighed at every step, the estimate is unbiased still, but its tail is too long to see it.
    evidence, mean = run(potential=potential, threshold=threshold, weighed=(6, 12))
    assert abs(z_score(evidence, EVIDENCE)) < 4
    assert abs(z_score(evidence * mean, EVIDENCE * TILTED_MEAN)) < 4


def test_without_resampling_it_is_importance_sampling():
    evidence, mean = run(threshold=0.0, particles=1)
    assert abs(z_score(evidence, EVIDENCE)) < 4
    assert abs(z_score(evidence * mean, EVIDENCE * TILTED_MEAN)) < 4


def test_potentials_on_the_way_lower_the_variance():
    steered, _ = run(threshold=0.5)
    plain, _ = run(threshold=0.0)
    twisted, _ = run(threshold=0.5, twisted=True)
    assert twisted.std() < plain.std() and steered.std() < 1.5 * plain.std()


def drop_weights(weights, draws, **options):
    """Broken: the weights of groups that are not resampled are thrown away."""
    resampled, index = resample(weights, draws, **options)
    return dataclasses.replace(resampled, log_weight=torch.zeros_like(resampled.log_weight)), index


def forget_what_was_paid(weights, draws, **options):
    """Broken: what a particle has paid stays with its place."""
    resampled, index = resample(weights, draws, **options)
    return dataclasses.replace(resampled, paid=weights.paid, summary=weights.summary), index


def forget_the_number(weights, draws, **options):
    """Broken: the evidence's factors lack 1 / N."""
    resampled, index = resample(weights, draws, **options)
    factor = math.log(weights.log_weight.shape[1])
    return dataclasses.replace(resampled, log_evidence=resampled.log_evidence + factor * (resampled.log_evidence != weights.log_evidence)), index


@pytest.mark.parametrize("broken", [drop_weights, forget_what_was_paid, forget_the_number])
def test_the_oracle_finds_the_published_mistakes(broken):
    evidence, mean = run(resample=broken, threshold=0.5)
    assert max(abs(z_score(evidence, EVIDENCE)), abs(z_score(evidence * mean, EVIDENCE * TILTED_MEAN))) > 8


def test_the_oracle_finds_a_proposal_without_its_correction(monkeypatch):
    monkeypatch.setitem(globals(), "proposal_log_ratio", lambda x, *_: torch.zeros(len(x), dtype=x.dtype))
    evidence, mean = run(twisted=True)
    assert abs(z_score(evidence, EVIDENCE)) > 8


# --- weights --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("potential", POTENTIALS)
def test_potentials_are_those_of_the_paper_and_sum_to_the_reward(potential):
    rewards, weights, paid = normal(5, 2, 3), initial_weights(2, 3), torch.zeros(2, 3, dtype=torch.float64)
    for k in range(4):
        weights = reweight(weights, rewards[k], potential=potential, reward_scale=2.0)
        before = rewards[k - 1] if k else 0.0
        paid = paid + 2.0 * {"difference": rewards[k] - before, "max": rewards[: k + 1].amax(0), "add": rewards[: k + 1].sum(0)}[potential]
        torch.testing.assert_close(weights.log_weight, paid)
    weights = reweight(weights, rewards[4], potential=potential, reward_scale=2.0, last=True)
    torch.testing.assert_close(weights.log_weight, 2.0 * rewards[4])
    torch.testing.assert_close(log_evidence(weights), (2.0 * rewards[4]).exp().mean(1).log())


def test_rewards_of_any_size_do_not_overflow():
    weights = reweight(initial_weights(1, 3), torch.tensor([[900.0, 899.0, -900.0]]), reward_scale=100.0)
    torch.testing.assert_close(log_evidence(weights), torch.tensor([90_000 - math.log(3)], dtype=torch.float64))
    assert effective_particles(weights.log_weight).item() == pytest.approx(1)


def test_a_particle_without_a_reward_has_no_weight_and_leaves_no_copies():
    weights = reweight(initial_weights(2, 3), torch.tensor([[0.0, torch.nan, 0.0], [torch.nan] * 3]), reward_scale=1.0)
    assert weights.log_weight.tolist() == [[0.0, -torch.inf, 0.0], [0.0, 0.0, 0.0]]  # a group without any keeps its weights
    for method in RESAMPLERS:
        resampled, index = resample(weights, uniforms(2, 3), method=method, ess_threshold=1.0)
        assert 1 not in index[0] and index[1].tolist() == [0, 1, 2]
        assert torch.isfinite(resampled.log_weight).all()


def test_a_reward_scale_of_zero_leaves_everything_alone():
    weights = reweight(initial_weights(3, 7), normal(3, 7), reward_scale=0.0)
    resampled, index = resample(weights, uniforms(3, 7), ess_threshold=1.0)
    assert torch.equal(index, torch.arange(7).expand(3, 7)) and (resampled.log_weight == 0).all() and (log_evidence(resampled).abs() < 1e-12).all()
    assert effective_particles(weights.log_weight).tolist() == pytest.approx([7] * 3)


@pytest.mark.parametrize("method", RESAMPLERS)
def test_resamplers_choose_in_proportion_to_the_weights(method):
    log_weight = torch.tensor([[0.5, 0.3, 0.2, 0.0]], dtype=torch.float64).log()
    index = ancestors(log_weight.expand(40_000, -1), uniforms(40_000, 4), method)
    counts = torch.stack([(index == i).sum(1) for i in range(4)], 1).double()
    expected = 4 * log_weight.exp()[0]
    assert (counts[:, 3] == 0).all()
    assert ((counts.mean(0) - expected).abs() <= 4 * counts.std(0) / 200).all()
    if method == "systematic":
        assert (counts >= expected.floor()).all() and (counts <= (expected + 1e-9).ceil()).all()


@pytest.mark.parametrize("method", RESAMPLERS)
def test_uniforms_at_the_edges_are_in_range(method):
    log_weight = torch.tensor([[-torch.inf, 0.0, -40.0, -torch.inf]], dtype=torch.float64)
    for value in (0.0, 1 - 2**-53):
        index = ancestors(log_weight, torch.full((1, 4), value, dtype=torch.float64), method)
        assert set(index.flatten().tolist()) <= {1, 2}


@pytest.mark.parametrize("method", RESAMPLERS)
def test_groups_never_mix(method):
    weights, draws = reweight(initial_weights(5, 4), normal(5, 4), reward_scale=3.0), uniforms(5, 4)
    whole, index = resample(weights, draws, method=method, ess_threshold=0.7)
    assert 0 < (index != torch.arange(4)).any(1).sum() < 5  # some are resampled, some are not
    order = torch.tensor([3, 0, 4, 1, 2])
    permuted = smc.Weights(*(getattr(weights, f.name)[order] for f in dataclasses.fields(weights)))
    other, other_index = resample(permuted, draws[order], method=method, ess_threshold=0.7)
    assert torch.equal(other_index, index[order])
    for field in dataclasses.fields(whole):
        assert torch.equal(getattr(other, field.name), getattr(whole, field.name)[order])


def test_proposals_are_corrected_by_the_ratio_of_their_densities():
    mean, shift, drawn, std = normal(4, 3), normal(4, 3, seed=1), normal(4, 3, seed=2), torch.tensor(0.7, dtype=torch.float64)
    proposal = twist(mean, std, shift)
    expected = torch.distributions.Normal(mean, std).log_prob(drawn) - torch.distributions.Normal(proposal, std).log_prob(drawn)
    torch.testing.assert_close(proposal_log_ratio(drawn, mean, proposal, std), expected.sum(1))
    assert (proposal_log_ratio(drawn, mean, mean, std) == 0).all()


def test_unknown_names_are_listed():
    with pytest.raises(ValueError, match="difference, max, add"):
        reweight(initial_weights(1, 2), torch.zeros(1, 2), potential="sum")
    with pytest.raises(ValueError, match="systematic, stratified, multinomial"):
        ancestors(torch.zeros(1, 2, dtype=torch.float64), uniforms(1, 2), "residual")
