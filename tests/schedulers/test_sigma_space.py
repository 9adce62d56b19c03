"""What sigmas and times mean off the table: against diffusers' own schedulers, and the ancestral step against the posterior."""

import math

import diffusers
import pytest
import torch
from schedules import SD, randn

from diffusers_align.schedulers.sigma_space import SigmaSpace, ancestral_step

BETAS = {name: SD[name] for name in ("beta_start", "beta_end", "beta_schedule")}
SVD = {**BETAS, "prediction_type": "v_prediction", "timestep_type": "continuous", "use_karras_sigmas": True, "sigma_min": 0.002, "sigma_max": 700.0}


def of(name: str, **config) -> SigmaSpace:
    return SigmaSpace(getattr(diffusers, name)(**config))


def stable_audio() -> SigmaSpace:
    """The scheduler itself needs a package that draws Brownian motion."""
    stock = type("CosineDPMSolverMultistepScheduler", (), {"init_noise_sigma": 500.001, "precondition_outputs": None})()
    stock.config = diffusers.configuration_utils.FrozenDict(sigma_min=0.3, sigma_max=500.0, sigma_data=1.0, prediction_type="v_prediction")
    return SigmaSpace(stock)


def cosmos2() -> SigmaSpace:
    stock = diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    stock.register_to_config(sigma_min=0.002, sigma_max=80.0, sigma_data=1.0)
    return SigmaSpace(stock)


SPACES = {
    "Karras": lambda: of("EulerDiscreteScheduler", **BETAS, use_karras_sigmas=True),
    "Karras v": lambda: of("EulerDiscreteScheduler", **BETAS, use_karras_sigmas=True, prediction_type="v_prediction"),
    "Karras sample": lambda: of("HeunDiscreteScheduler", **BETAS, use_karras_sigmas=True, prediction_type="sample"),
    "DPM-Solver": lambda: of("DPMSolverMultistepScheduler", **BETAS, use_karras_sigmas=True),
    "DPM-Solver v": lambda: of("DPMSolverMultistepScheduler", **BETAS, use_karras_sigmas=True, prediction_type="v_prediction"),
    "SVD": lambda: of("EulerDiscreteScheduler", **SVD),
    "EDM": lambda: of("EDMEulerScheduler"),
    "EDM v": lambda: of("EDMDPMSolverMultistepScheduler", sigma_data=1.0, prediction_type="v_prediction"),
    "Cosmos 2": cosmos2,
    "StableAudio": stable_audio,
}


# --- the step ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sigma", "after"), [(14.6, 6.0), (80.0, 79.0), (1.0, 0.01), (700.0, 0.002)])
def test_with_eta_1_the_step_is_the_exact_posterior(sigma, after):
    """x' and x = x' + sqrt(sigma^2 - sigma'^2) z given x0: q(x' | x, x0) by conditioning a Gaussian."""
    kept, added = ancestral_step(sigma, after, 1.0)
    gain = after**2 / sigma**2  # Cov(x', x) / Var(x)
    assert added**2 == pytest.approx(after**2 * (1 - gain), rel=1e-9)
    assert kept / sigma == pytest.approx(gain, rel=1e-6), "the weight of x - x0 in the mean"


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_what_is_kept_and_what_is_added_make_the_next_noise(eta):
    kept, added = ancestral_step(5.0, 2.0, eta)
    assert kept**2 + added**2 == pytest.approx(4.0) and (added > 0) == (eta > 0)
    up = min(2.0, eta * (2.0**2 * (5.0**2 - 2.0**2) / 5.0**2) ** 0.5)  # k-diffusion's line
    assert added == pytest.approx(up) and kept == pytest.approx((2.0**2 - up**2) ** 0.5)


@pytest.mark.parametrize(("sigma", "after"), [(0.03, 0.0), (0.5, 0.5), (0.5, 0.7)])
def test_no_noise_where_sigma_does_not_fall_or_falls_to_nothing(sigma, after):
    assert ancestral_step(sigma, after, 1.0) == (after, 0.0)


# --- times -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPACES)
def test_times_tell_noise_levels_and_back(name):
    space = SPACES[name]()
    low, high = space.time_range
    times = torch.linspace(low, high, 13, dtype=torch.float64)
    sigmas = space.sigma_of(times)
    assert (sigmas.diff() > 0).all() and low < high
    assert [space.time_of(sigma) for sigma in sigmas.tolist()] == pytest.approx(times.tolist(), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "SVD", "exponential"])
def test_a_stock_schedules_times_tell_its_own_sigmas(name):
    config = {"SVD": SVD, "exponential": {**BETAS, "use_exponential_sigmas": True}, "EulerDiscreteScheduler": {**BETAS, "use_karras_sigmas": True}}
    stock = getattr(diffusers, name if name.endswith("Scheduler") else "EulerDiscreteScheduler")(**config.get(name, {}))
    stock.set_timesteps(9)
    torch.testing.assert_close(SigmaSpace(stock).sigma_of(stock.timesteps), stock.sigmas[:-1].double(), rtol=2e-5, atol=0)


def test_ranges_are_those_of_the_model():
    for name, ends in {"Karras": (0, 999), "SVD": (math.log(0.002) / 4, math.log(700) / 4), "EDM": (math.log(0.002) / 4, math.log(80) / 4),
                       "Cosmos 2": (2.0, 80_000), "StableAudio": (math.atan(0.3) * 2 / math.pi, math.atan(500) * 2 / math.pi)}.items():  # fmt: skip
        assert SPACES[name]().time_range == pytest.approx(ends), name


def test_stable_audio_is_told_the_arc_of_its_noise():
    space = stable_audio()
    assert space.sigma_of(torch.tensor(0.5)) == pytest.approx(1.0) and space.times == "atan" and space.exploding


# --- what an output means ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPACES)
def test_a_perfect_answer_implies_the_clean_sample_and_the_noise(name):
    space = SPACES[name]()
    x0, noise = randn(0, dtype=torch.float64), randn(1, dtype=torch.float64)
    for sigma in (0.05, 1.0, 40.0):
        sigma = torch.tensor(sigma, dtype=torch.float64)
        a, b = space.target_weights(sigma)
        output, state = a * x0 + b * noise, space.alpha(sigma) * (x0 + sigma * noise)
        for weights, expected in ((space.clean_weights, x0), (space.noise_weights, noise)):
            of_state, of_output = weights(sigma)
            torch.testing.assert_close(of_state * state + of_output * output, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_edm_reads_outputs_as_diffusers_does(name, prediction_type):
    stock = getattr(diffusers, name)(prediction_type=prediction_type, sigma_data=0.7)
    sigma, x, output = torch.tensor(3.0, dtype=torch.float64), randn(0, dtype=torch.float64), randn(1, dtype=torch.float64)
    c_skip, c_out = SigmaSpace(stock).preconditioning(sigma)
    torch.testing.assert_close(c_skip * x + c_out * output, stock.precondition_outputs(x, output, sigma), rtol=1e-12, atol=0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_euler_reads_outputs_as_diffusers_does(prediction_type):
    stock = diffusers.EulerDiscreteScheduler(**BETAS, use_karras_sigmas=True, prediction_type=prediction_type)
    stock.set_timesteps(6)
    x, output, sigma = randn(0), randn(1), stock.sigmas[2]
    stock._step_index = 2
    state, answer = SigmaSpace(stock).clean_weights(sigma.double())
    torch.testing.assert_close((state * x + answer * output).float(), stock.step(output, stock.timesteps[2], x).pred_original_sample, rtol=1e-5, atol=1e-5)
