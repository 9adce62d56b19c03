"""InPO: the inversion that finds a pair's noise."""

import math

import pytest
import torch
from linear_models import PROCESSES, TIMES, assert_equal, levels_of, noised, random, tensor

from diffusers_align.algorithms.inpo import inversion_times, invert, inverted_noise
from diffusers_align.rl.matching import matching_error


@pytest.mark.parametrize("kind", PROCESSES)
def test_inverted_noise_is_that_of_the_forward_process(kind):
    forward = PROCESSES[kind]
    x0, noise, _, x_t = noised(forward)
    assert_equal(inverted_noise(x_t, x0, *levels_of(forward)(TIMES.double())), noise, atol=1e-8)


def test_inversion_times():
    t = torch.tensor([900, 35, 3])
    times = inversion_times(t, num_steps=10)
    assert times.shape == (11, 3) and times.dtype == torch.int64
    assert (times[0] == 0).all() and (times[-1] == t).all() and (times.diff(dim=0) >= 0).all()
    assert times[:, 0].tolist() == list(range(0, 901, 90))
    assert_equal(inversion_times(tensor(400, 1000), num_steps=2, clean=1000.0), [[1000, 1000], [700, 1000], [400, 1000]])


@pytest.mark.parametrize("kind", PROCESSES)
def test_an_inversion_starts_where_there_is_least_noise(kind):
    forward = PROCESSES[kind]
    clean = inversion_times(TIMES[1:4], num_steps=3, clean=forward.clean_timestep)[0]
    assert (clean == (1000 if kind == "inverted flow" else 0)).all()
    assert (forward.sigma(clean) < forward.sigma(TIMES[1:4])).all()


def gaussian_denoiser(forward, mean, variance):
    """The best denoiser of data N(mean, variance)."""

    def denoise(x, t):
        alpha, sigma = (level.reshape(-1, 1) for level in levels_of(forward)(t))
        clean = mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x - alpha * mean)
        return clean, (x - alpha * clean) / sigma

    return denoise


@pytest.mark.parametrize("kind", ["flow", "epsilon"])
def test_inversion_follows_the_probability_flow(kind):
    forward, x0, t = PROCESSES[kind], 0.5 + 1.5 * random(5, 3), torch.tensor([990.0, 700.0, 300.0, 100.0, 50.0])
    denoise = gaussian_denoiser(forward, 0.5, 2.25)
    times = inversion_times(t.double() if kind == "flow" else t.long(), num_steps=400, clean=1.0)
    start, end = (torch.stack(levels_of(forward)(time.double())) for time in (times[0], times[-1]))
    x_t = invert(start[0, :, None] * x0, times, denoise, lambda time: levels_of(forward)(time.double()), eta=0)
    spread = [(level[0] ** 2 * 2.25 + level[1] ** 2).sqrt()[:, None] for level in (start, end)]
    centre = [level[0][:, None] * 0.5 for level in (start, end)]
    expected = centre[1] + spread[1] / spread[0] * (start[0, :, None] * x0 - centre[0])
    assert (x_t - expected).abs().max() < 0.05
    noise = inverted_noise(x_t, x0, *end)
    assert (matching_error(forward.add_noise(x0, noise, t.double()), x_t) < 1e-12).all()


def test_each_sample_is_inverted_to_its_own_time():
    forward, x0, t = PROCESSES["flow"], random(3, 4), tensor(900, 500, 20)
    denoise, levels = gaussian_denoiser(forward, 0.0, 1.0), levels_of(forward)
    times = inversion_times(t, clean=1.0)
    together = invert(x0, times, denoise, levels, eta=0)
    one_by_one = [invert(x0[i : i + 1], times[:, i : i + 1], denoise, levels, eta=0) for i in range(3)]
    assert_equal(together, torch.cat(one_by_one))
    assert not torch.cat(one_by_one).requires_grad
    noisy = [invert(x0[rows], times[:, rows], denoise, levels, generator=[torch.Generator().manual_seed(i) for i in rows]) for rows in ([0, 1, 2], [2, 0])]
    assert_equal(noisy[1], noisy[0][[2, 0]])
    assert (noisy[0] - together).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["flow", "epsilon"])
def test_the_noise_of_an_inversion_step(kind):
    forward, eta = PROCESSES[kind], 0.1
    times = torch.tensor([[300], [500]])
    x0 = torch.zeros(40_000, 1, dtype=torch.float64)

    def silent(x, t):
        return torch.zeros_like(x), torch.zeros_like(x)

    drawn = invert(x0, times, silent, lambda t: levels_of(forward)(t.double()), eta=eta, generator=torch.Generator().manual_seed(0))
    if kind == "epsilon":  # diffusers' own variance of the step back
        expected = eta * forward.scheduler._get_variance(500, 300) ** 0.5
    else:
        expected = eta * 0.3 * math.sqrt(1 - (0.5 * 0.3 / (0.7 * 0.5)) ** 2)
    assert drawn.std().item() == pytest.approx(float(expected), rel=0.02)
    still = invert(x0[:2], torch.zeros(3, 2, dtype=torch.long), silent, lambda t: (1 - t.double(), t.double()), generator=torch.Generator())
    assert still.abs().max() == 0
