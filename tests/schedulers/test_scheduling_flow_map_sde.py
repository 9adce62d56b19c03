"""Flow maps with noise: the law of the draw for the exact map of Gaussian data, and the stock step without."""

import math

import pytest
import torch
from marginals import MEAN, VARIANCE, run_chain
from own_noise import begun
from schedules import gen, randn

from diffusers_align import sde_twin

diffusers = pytest.importorskip("diffusers", minversion="0.39")
FlowMap = getattr(diffusers, "FlowMapEulerDiscreteScheduler", None)
pytestmark = pytest.mark.skipif(FlowMap is None, reason="this diffusers has no flow map scheduler")


def spread(sigma):
    return math.sqrt((1 - sigma) ** 2 * VARIANCE + sigma**2)


def chain(steps, eta):
    twin = begun(sde_twin(FlowMap(shift=5.0), eta=eta), steps)
    start, ends = twin.levels.tolist(), twin.sigmas.tolist()

    def affine(k):
        x, sigma, end = torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(2, 1), start[k], ends[k + 1]
        moved_to = (1 - end) * MEAN + (x - (1 - sigma) * MEAN) * spread(end) / spread(sigma)
        draw = twin._draw((x - moved_to) / (sigma - end), k, x)
        base, moved = draw.mean.flatten().tolist()
        return moved - base, base, float(draw.std.flatten()[0])

    return run_chain((1 - start[0]) * MEAN, spread(start[0]) ** 2, (affine(k) for k in range(steps)))


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_the_samples_have_the_datas_law_at_any_number_of_steps(steps, eta):
    mean, variance, memory = chain(steps, eta)
    assert mean == pytest.approx(MEAN, abs=1e-5) and variance == pytest.approx(VARIANCE, abs=1e-5)
    assert (memory < 0.999) == (eta > 0 and steps > 1)


@pytest.mark.parametrize("off", ["eta", "deterministic"])
def test_without_noise_it_is_the_stock_step_bit_for_bit(off):
    stock, twin = begun(FlowMap(shift=5.0), 4), sde_twin(FlowMap(shift=5.0), eta=0.0 if off == "eta" else 0.3)
    twin.deterministic = off == "deterministic"
    begun(twin, 4)
    assert torch.equal(twin.sigmas, stock.sigmas) and not twin.stochastic_steps.any()
    x = y = randn(0)
    for t in stock.timesteps:
        x, y = stock.step(torch.tanh(x), t, x).prev_sample, twin.step(torch.tanh(y), t, y, generator=gen()).prev_sample
        assert torch.equal(x, y)


def test_the_model_is_told_where_the_jump_ends():
    stock, twin = begun(FlowMap(shift=5.0), 4), begun(sde_twin(FlowMap(shift=5.0), eta=0.25), 4)
    assert torch.equal(twin.timesteps, stock.timesteps) and torch.equal(twin.levels, stock.sigmas)
    torch.testing.assert_close(twin.sigmas[1:], 0.75 * stock.sigmas[1:])
    assert twin.stochastic_steps.tolist() == [True, True, True, False]


def test_what_is_drawn_is_scored_and_what_is_given_too():
    twin = begun(sde_twin(FlowMap(shift=5.0)), 4)
    first = twin.step(randn(1), twin.timesteps[0], randn(0), generator=gen())
    again = begun(twin, 4).step(randn(1), twin.timesteps[0], randn(0), prev_sample=first.prev_sample)
    assert torch.equal(again.log_prob, first.log_prob) and torch.equal(again.prev_sample, first.prev_sample)
    assert first.prev_sample.dtype == first.prev_sample_mean.dtype == torch.float32


def test_another_end_of_a_step_is_refused():
    twin = begun(sde_twin(FlowMap()), 4)
    with pytest.raises(ValueError, match="leave r_timestep out"):
        twin.step(randn(1), twin.timesteps[0], randn(0), r_timestep=100.0)


def test_clean_samples_are_of_each_samples_own_time():
    twin = begun(sde_twin(FlowMap(shift=5.0)), 4)
    times, states, outputs = twin.timesteps[[0, 2]], randn(1)[:2], randn(2)[:2]
    own = [twin.clean_sample(outputs[i : i + 1], t, states[i : i + 1]) for i, t in enumerate(times)]
    torch.testing.assert_close(twin.clean_sample(outputs, times, states), torch.cat(own), rtol=1e-6, atol=1e-6)
