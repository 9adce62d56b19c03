r"""The law of re-noising: data x_0 ~ N(m, s^2) and the exact consistency function, which is linear, so that the moments of a whole chain follow.

Along the ODE of x_t = alpha x_0 + sigma eps, whose marginal is N(alpha m, r^2) with r^2 = alpha^2 s^2 + sigma^2, a state keeps its quantile: the clean
sample is m + (x - alpha m) s / r. Whatever the number of steps, the result has the data's law.
"""

import math

import pytest
import torch
from diffusers import FlowMatchLCMScheduler, LCMScheduler, SCMScheduler, TCDScheduler
from marginals import MEAN, VARIANCE, run_chain
from own_noise import begun
from schedules import randn
from tiny_pipelines import FAMILIES

from diffusers_align import sde_twin
from diffusers_align.schedulers import CMSDEScheduler, FlowMatchLCMSDEScheduler, LCMSDEScheduler, SCMSDEScheduler, TCDSDEScheduler


def clean(x, alpha, sigma, least=0.0):
    """The exact consistency function; `least`: the noise that is left at its end."""
    return MEAN + (x - alpha * MEAN) * math.sqrt(VARIANCE + least**2) / math.sqrt(alpha**2 * VARIANCE + sigma**2)


def chain(twin, start, output):
    """Mean and variance of the last state and its correlation with the first; `start` is the first state's alpha and sigma, `output(k, x)` the
    exact model's answer."""
    alpha, sigma = start

    def affine(k):
        x = torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(2, 1)
        draw = twin._draw(output(k, x), k, x)
        base, moved = draw.mean.flatten().tolist()
        return moved - base, base, float(draw.std.flatten()[0]) if twin._has_noise(k) else 0.0

    return run_chain(alpha * MEAN, alpha**2 * VARIANCE + sigma**2, (affine(k) for k in range(twin.num_steps)))


def levels(twin, k):
    """alpha and sigma of a table at step k."""
    alpha2 = float(twin.alphas_cumprod[twin.timesteps[k]])
    return math.sqrt(alpha2), math.sqrt(1 - alpha2)


def noise_of(x, x0, alpha, sigma):
    return (x - alpha * x0) / sigma


def lcm_chain(steps):
    twin = begun(sde_twin(LCMScheduler()), steps)

    def output(k, x):
        c_skip, c_out = twin.get_scalings_for_boundary_condition_discrete(twin.timesteps[k])
        alpha, sigma = levels(twin, k)
        return noise_of(x, (clean(x, alpha, sigma) - c_skip * x) / c_out, alpha, sigma)

    return chain(twin, levels(twin, 0), output)


def tcd_chain(steps, eta):
    twin = begun(sde_twin(TCDScheduler(), eta=eta), steps)

    def output(k, x):
        """The noise with which the stock formula leads to where the ODE leads, at the time s that the step walks to."""
        (alpha, sigma), below = levels(twin, k), float(twin._levels(k)[0])
        signal, noise = math.sqrt(below), math.sqrt(1 - below)
        walked = signal * MEAN + (x - alpha * MEAN) * math.sqrt((below * VARIANCE + 1 - below) / (alpha**2 * VARIANCE + sigma**2))
        return (walked - signal * x / alpha) / (noise - signal * sigma / alpha)

    return chain(twin, levels(twin, 0), output)


def flow_chain(steps, shift=3.0):
    twin = begun(sde_twin(FlowMatchLCMScheduler(shift=shift)), steps)
    sigmas = twin.sigmas.tolist()
    return chain(twin, (1 - sigmas[0], sigmas[0]), lambda k, x: (x - clean(x, 1 - sigmas[k], sigmas[k])) / sigmas[k])


def scm_chain(steps):
    twin = sde_twin(SCMScheduler())
    twin.set_timesteps(steps, intermediate_timesteps=1.3 if steps == 2 else None)
    times, data = twin.timesteps.tolist(), twin.config.sigma_data
    level = lambda k: (math.cos(times[k]), math.sin(times[k]) * data)  # noqa: E731
    return chain(twin, level(0), lambda k, x: (math.cos(times[k]) * x - clean(x, *level(k))) / math.sin(times[k]))


def cm_chain(steps):
    twin = begun(CMSDEScheduler(clip_denoised=False), steps)
    least = twin.config.sigma_min

    def output(k, x):
        c_skip, c_out = twin.get_scalings_for_boundary_condition(twin.sigmas[k])
        return (clean(x, 1.0, float(twin.sigmas[k]), least) - c_skip * x) / c_out

    return chain(twin, (1.0, float(twin.sigmas[0])), output)


CHAINS = {
    "lcm": lcm_chain, "tcd": lambda steps: tcd_chain(steps, 0.3), "tcd all noise": lambda steps: tcd_chain(steps, 1.0), "flow lcm": flow_chain,
    "scm": scm_chain, "cm": cm_chain,
}  # fmt: skip


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", CHAINS)
def test_the_samples_have_the_datas_law_at_any_number_of_steps(kind, steps):
    mean, variance, _ = CHAINS[kind](steps)
    assert mean == pytest.approx(MEAN, abs=2e-3)
    assert variance == pytest.approx(VARIANCE, abs=2e-3)


@pytest.mark.parametrize("kind", ["lcm", "tcd all noise", "scm", "cm"])
def test_noise_makes_a_chain_forget_its_start(kind):
    one, four = CHAINS[kind](1)[2], CHAINS[kind](4)[2]
    assert one == pytest.approx(1, abs=1e-6) and abs(four) < 0.9


def test_gamma_is_how_much_a_step_of_tcd_forgets():
    memory = [tcd_chain(4, eta)[2] for eta in (0.0, 0.3, 0.6, 1.0)]
    assert memory[0] == pytest.approx(1, abs=1e-6) and memory == sorted(memory, reverse=True) and memory[3] < memory[1] - 0.05


def test_a_kernel_without_the_boundary_condition_has_another_law():
    """The test above can fail: with the plain clean estimate of the denoiser, E[x_0 | x_t], the variance comes out short."""
    twin = begun(sde_twin(FlowMatchLCMScheduler(shift=3.0)), 4)
    sigmas = twin.sigmas.tolist()

    def posterior_velocity(k, x):
        alpha, sigma = 1 - sigmas[k], sigmas[k]
        x0 = MEAN + (x - alpha * MEAN) * alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2)
        return (x - x0) / sigma

    assert chain(twin, (1 - sigmas[0], sigmas[0]), posterior_velocity)[1] < 0.8 * VARIANCE


@pytest.mark.parametrize("cls", [LCMSDEScheduler, TCDSDEScheduler, FlowMatchLCMSDEScheduler, SCMSDEScheduler, CMSDEScheduler])
def test_a_twin_is_its_stock_scheduler(cls):
    assert issubclass(cls, cls.__mro__[[c.__module__.startswith("diffusers.") for c in cls.__mro__].index(True)])
    assert cls().num_steps >= 1


@pytest.mark.parametrize("eta", [-0.1, 1.1])
def test_tcd_refuses_impossible_gamma(eta):
    with pytest.raises(ValueError, match="eta must be a finite number, from 0 to 1"):
        TCDSDEScheduler(eta=eta)


def test_tcd_without_gamma_is_the_stock_walk_without_noise():
    twin, stock = begun(TCDSDEScheduler(eta=0.0), 4), begun(TCDScheduler(), 4)
    assert not twin.stochastic_steps.any()
    x = randn(0)
    for t in stock.timesteps:
        x, y = (s.step(torch.tanh(x), t, x, **k).prev_sample for s, k in ((twin, {}), (stock, {"eta": 0.0})))
        assert torch.equal(x, y)


def test_states_that_grow_are_refused():
    twin = FlowMatchLCMSDEScheduler(scale_factors=[2.0, 1.0])
    twin.set_timesteps(3)
    with pytest.raises(ValueError, match="scale_factors let the states grow"):
        twin.step(randn(0), twin.timesteps[0], randn(1))


def images(scheduler, **call):
    pipeline = FAMILIES["sd15"].build()
    pipeline.scheduler = scheduler
    pipeline.set_progress_bar_config(disable=True)
    call = {"height": 16, "width": 16, "num_inference_steps": 4, "output_type": "np"} | call
    return torch.from_numpy(pipeline(["a cat", "a dog"], generator=torch.Generator().manual_seed(3), **call).images)


def test_a_stock_pipeline_gives_the_same_images_with_the_stock_scheduler_and_the_twin():
    assert torch.equal(images(LCMScheduler()), images(sde_twin(LCMScheduler())))
    tcd = images(TCDScheduler(), eta=0.3)
    assert torch.equal(images(sde_twin(TCDScheduler())), tcd)  # the pipeline passes eta=0.0
    assert not torch.equal(images(TCDScheduler()), tcd)
