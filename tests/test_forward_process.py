"""Noising, targets and their inverses against closed forms and against diffusers' own schedulers."""

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from linear_models import PROCESSES, TIMES, noised

from diffusers_align import sde_twin
from diffusers_align.forward_process import WEIGHTINGS, ForwardProcess
from diffusers_align.rl.matching import matching_error

torch.set_num_threads(1)
PREDICTIONS = ["flow", "inverted flow", "epsilon", "v_prediction", "sample"]


TABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
EDGES = {"use_karras_sigmas": True, "sigma_min": 0.002, "sigma_max": 700.0}
SIGMA_SPACE = {
    "Karras": lambda: EulerDiscreteScheduler(**TABLE, use_karras_sigmas=True),
    "Karras v": lambda: EulerDiscreteScheduler(**TABLE, use_karras_sigmas=True, prediction_type="v_prediction"),
    "Karras DPM-Solver": lambda: DPMSolverMultistepScheduler(**TABLE, use_karras_sigmas=True),
    "Karras DPM-Solver v": lambda: DPMSolverMultistepScheduler(**TABLE, use_karras_sigmas=True, prediction_type="v_prediction"),
    "SVD": lambda: EulerDiscreteScheduler(**TABLE, **EDGES, prediction_type="v_prediction", timestep_type="continuous"),
    "EDM": EDMEulerScheduler,
}


def process(kind: str, **config) -> ForwardProcess:
    if kind in SIGMA_SPACE:
        return ForwardProcess(sde_twin(SIGMA_SPACE[kind]()))
    if "flow" in kind:
        return ForwardProcess(sde_twin(FlowMatchEulerDiscreteScheduler(invert_sigmas="inverted" in kind, **config)))
    return ForwardProcess(sde_twin(DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=kind, **config)))


def draw(forward, dtype=torch.float64, number=5):
    generator = torch.Generator().manual_seed(0)
    x0, noise, output = torch.randn(3, number, 4, 3, 2, generator=generator, dtype=dtype)
    return x0, noise, output, forward.sample_timesteps(number, generator)


# --- the algebra -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*PREDICTIONS, *SIGMA_SPACE])
def test_round_trip(kind):
    forward = process(kind)
    x0, noise, output, t = draw(forward)
    x_t, target = forward.add_noise(x0, noise, t), forward.target(x0, noise, t)
    close = {"rtol": 1e-10, "atol": 1e-9}
    torch.testing.assert_close(forward.to_x0(target, x_t, t), x0, **close)
    torch.testing.assert_close(forward.to_noise(target, x_t, t), noise, **close)
    torch.testing.assert_close(forward.to_velocity(target, x_t, t), noise - x0, **close)
    # Of any output, not of the target alone: what it implies is consistent with x_t.
    implied = forward.add_noise(forward.to_x0(output, x_t, t), forward.to_noise(output, x_t, t), t)
    torch.testing.assert_close(implied, x_t, **close)
    torch.testing.assert_close(forward.target(forward.to_x0(output, x_t, t), forward.to_noise(output, x_t, t), t), output, **close)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_levels(kind):
    forward = process(kind)
    t = forward.sample_timesteps(7, torch.Generator().manual_seed(1)).double()
    alpha, sigma = forward.alpha(t), forward.sigma(t)
    assert alpha.dtype == torch.float64 and forward.alpha(t.float()).dtype == torch.float32
    torch.testing.assert_close(alpha + sigma if "flow" in kind else alpha**2 + sigma**2, torch.ones(7).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(forward.snr(t), (alpha / sigma) ** 2)
    torch.testing.assert_close(forward.flow_time(t), sigma if "flow" in kind else sigma / (alpha + sigma))
    rising = forward.sigma(t.sort().values).diff()
    assert (rising < 0).all() if "inverted" in kind else (rising > 0).all()


def test_the_velocity_is_the_time_derivative_of_the_rescaled_state():
    forward, t = process("v_prediction"), torch.tensor([300, 301])
    x0, noise = torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    states = forward.add_noise(x0.expand(2, 6), noise.expand(2, 6), t) / (forward.alpha(t) + forward.sigma(t))[:, None].double()
    time = forward.flow_time(t.double())
    derivative = (states[1] - states[0]) / (time[1] - time[0])
    velocity = forward.to_velocity(forward.target(x0, noise, t[:1]), forward.add_noise(x0, noise, t[:1]), t[:1])
    torch.testing.assert_close(derivative, velocity[0], rtol=1e-3, atol=1e-3)


def test_half_precision_is_computed_in_float32_and_noised_in_its_own():
    forward = process("epsilon")
    x0, noise, output, t = draw(forward, torch.bfloat16)
    x_t = forward.add_noise(x0, noise, t)
    assert x_t.dtype == torch.bfloat16 and forward.to_x0(output, x_t, t).dtype == torch.float32 == forward.target(x0, noise, t).dtype
    assert torch.equal(x_t, forward.add_noise(x0.float(), noise.float(), t).bfloat16())
    assert forward.to_velocity(output, x_t, t).dtype == process("flow").to_velocity(output, x_t, t).dtype == torch.float32


# --- diffusers' own ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_diffusion_is_that_of_diffusers(kind):
    forward = process(kind)
    stock = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=kind, clip_sample=False)
    x0, noise, output, t = draw(forward, torch.float32)
    x_t = stock.add_noise(x0, noise, t)
    torch.testing.assert_close(forward.add_noise(x0, noise, t), x_t)
    if kind == "v_prediction":
        torch.testing.assert_close(forward.target(x0, noise, t), stock.get_velocity(x0, noise, t))
    stock.set_timesteps(1000)
    for i in range(len(t)):
        clean = stock.step(output[i : i + 1], int(t[i]), x_t[i : i + 1]).pred_original_sample
        torch.testing.assert_close(forward.to_x0(output, x_t, t)[i : i + 1], clean)


@pytest.mark.parametrize("kind", ["flow", "inverted flow"])
def test_flow_is_that_of_diffusers(kind):
    stock = FlowMatchEulerDiscreteScheduler(shift=3.0, invert_sigmas="inverted" in kind)
    forward = ForwardProcess(sde_twin(stock))
    stock.set_timesteps(10)
    x0, noise, output, _ = draw(forward, torch.float32)
    t = stock.timesteps[2:7]
    if kind == "flow":
        torch.testing.assert_close(forward.add_noise(x0, noise, t), stock.scale_noise(x0, t, noise))
    # A step of the ODE with the target goes from x_t to x_t' exactly.
    target = forward.target(x0, noise, t)
    for i in range(len(t)):
        stock._step_index = None
        stepped = stock.step(target[i], t[i], forward.add_noise(x0, noise, t)[i]).prev_sample
        torch.testing.assert_close(stepped, forward.add_noise(x0, noise, stock.timesteps[3 + i].expand(5))[i], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", SIGMA_SPACE)
def test_sigma_space_is_that_of_diffusers(kind):
    """A stock Euler step with the target goes from x_t to x_t' exactly; with solver order 1, DPM-Solver's too."""
    stock = SIGMA_SPACE[kind]()
    stock = type(stock).from_config(stock.config, **({"solver_order": 1} if "DPM" in kind else {}))
    forward = ForwardProcess(sde_twin(stock))
    stock.set_timesteps(10)
    x0, noise, _, _ = draw(forward, torch.float32)
    t = stock.timesteps[2:7]
    x_t, target = forward.add_noise(x0, noise, t), forward.target(x0, noise, t)
    torch.testing.assert_close(x_t, stock.add_noise(x0, noise, t), rtol=1e-2 if "DPM" in kind else 1e-4, atol=1e-2 if "DPM" in kind else 1e-4)
    for i in range(5):
        stock.set_timesteps(10)
        stock.set_begin_index(2 + i)
        stepped = stock.step(target[i : i + 1], t[i], x_t[i : i + 1]).prev_sample
        expected = forward.add_noise(x0[i : i + 1], noise[i : i + 1], stock.timesteps[3 + i : 4 + i])
        torch.testing.assert_close(stepped, expected, rtol=2e-2 if "DPM" in kind else 1e-4, atol=2e-2 if "DPM" in kind else 1e-3)


@pytest.mark.parametrize("kind", ["SVD", "EDM"])
def test_continuous_times(kind):
    forward = process(kind)
    low, high = forward.scheduler.time_range
    t = forward.sample_timesteps(20_001, torch.Generator().manual_seed(0), stratified=True)
    assert t.dtype == torch.float32 and t.min() >= low - 1e-6 and t.max() <= high + 1e-6
    assert t.median() == pytest.approx((low + high) / 2, abs=1e-3) and forward.clean_timestep == low
    assert forward.sigma(torch.tensor([0.0])) == 1.0 and forward.alpha(t).unique().tolist() == [1.0]
    with pytest.raises(ValueError, match=rf"Timesteps must lie in \[{low:g}, {high:g}\], got 999"):
        forward.sigma(torch.tensor([999.0]))


def test_between_the_rows_of_its_table_a_level_follows_the_logarithm():
    forward = process("Karras")
    low, between, high = forward.sigma(torch.tensor([500.0, 500.5, 501.0], dtype=torch.float64)).log().tolist()
    assert between == pytest.approx((low + high) / 2, abs=1e-12)
    t = forward.sample_timesteps(50, torch.Generator().manual_seed(0))
    assert torch.equal(t, t.round()) and forward.clean_timestep == 0 and not forward.whole_timesteps


def test_a_table_that_was_copied_from_another_scheduler():
    stock = CogVideoXDDIMScheduler(snr_shift_scale=3.0)
    forward = ForwardProcess(sde_twin(stock))
    x0, noise, _, t = draw(forward, torch.float32)
    torch.testing.assert_close(forward.add_noise(x0, noise, t), stock.add_noise(x0, noise, t))


@pytest.mark.parametrize(
    "stock",
    [
        UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
        DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0, algorithm_type="dpmsolver++"),
        FlowMatchHeunDiscreteScheduler(shift=3.0),
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        FlowMatchEulerDiscreteScheduler(shift=3.0, use_karras_sigmas=True),
        FlowMatchEulerDiscreteScheduler(shift_terminal=0.1),
    ],
    ids=lambda stock: type(stock).__name__,
)
def test_the_timestep_tells_the_noise_level_of_each_flow_schedule(stock):
    twin = sde_twin(stock)
    forward = ForwardProcess(twin)
    twin.set_timesteps(12, **({"mu": 0.9} if stock.config.get("use_dynamic_shifting") else {}))
    # UniPC rounds its timesteps to whole numbers, and tells the model so.
    torch.testing.assert_close(forward.sigma(twin.timesteps), twin.sigmas[:12], rtol=0, atol=1.1e-3)


def test_a_schedule_whose_timesteps_say_something_else_is_refused(monkeypatch):
    twin = sde_twin(FlowMatchEulerDiscreteScheduler())

    def set_timesteps(self, number, **kwargs):
        self.sigmas, self.timesteps = torch.linspace(1, 0, number + 1), torch.linspace(1000, 500, number)

    monkeypatch.setattr(type(twin), "set_timesteps", set_timesteps)
    with pytest.raises(ValueError, match="timesteps are not 1000 times its sigmas .*FlowMatchEulerDiscreteScheduler"):
        ForwardProcess(twin)


def test_errors_say_what_to_do():
    with pytest.raises(TypeError, match="DDIMScheduler is no policy's scheduler; pass policy.scheduler"):
        ForwardProcess(DDIMScheduler())
    for kind, t, message in [("epsilon", [1000], "whole numbers from 0 to 999"), ("epsilon", [0.5], "whole numbers"), ("flow", [-1.0], r"in \[0, 1000\]")]:
        with pytest.raises(ValueError, match=message):
            process(kind).sigma(torch.tensor(t))
    with pytest.raises(ValueError, match="no sampling grid yet: pass grid=trajectory.timesteps"):
        process("flow").sample_timesteps(3, scheme="grid")
    with pytest.raises(ValueError, match="Unknown scheme 'normal'; choose one of uniform, logit_normal, grid"):
        process("flow").sample_timesteps(3, scheme="normal")


# --- drawing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("stratified", [False, True])
def test_uniform_timesteps(kind, stratified):
    t = process(kind).sample_timesteps(20_000, torch.Generator().manual_seed(0), stratified=stratified).double()
    assert t.min() >= 0 and t.max() <= 1000
    quantiles = torch.quantile(t, torch.tensor([0.1, 0.5, 0.9]).double())
    torch.testing.assert_close(quantiles, torch.tensor([100.0, 500.0, 900.0]).double(), rtol=0, atol=1.1 if stratified else 12)
    assert abs(torch.corrcoef(torch.stack([t[1:], t[:-1]]))[0, 1]) < 0.03


def test_logit_normal_timesteps_and_the_shift():
    generator = torch.Generator().manual_seed(0)
    forward = process("flow", shift=3.0)
    t = forward.sample_timesteps(20_000, generator, "logit_normal", mean=0.3, std=0.8, shift=1.0, stratified=True).double() / 1000
    logit = torch.logit(t)
    assert logit.mean() == pytest.approx(0.3, abs=0.01) and logit.std() == pytest.approx(0.8, abs=0.01)
    median = forward.sample_timesteps(20_001, generator, stratified=True).median() / 1000
    assert median == pytest.approx(3 * 0.5 / (1 + 2 * 0.5), abs=1e-3), "the scheduler's own shift, as in training"
    dynamic = process("flow", use_dynamic_shifting=True, shift=3.0).sample_timesteps(20_001, generator, stratified=True)
    assert dynamic.median() == pytest.approx(500, abs=1), "a dynamic shift is the sampler's"


@pytest.mark.parametrize("kind", ["flow", "epsilon"])
def test_timesteps_of_the_grid(kind):
    forward, generator = process(kind), torch.Generator().manual_seed(0)
    forward.scheduler.set_timesteps(6)
    grid = forward.scheduler.timesteps
    drawn = forward.sample_timesteps(6, generator, "grid", stratified=True)
    assert drawn.dtype == grid.dtype and torch.equal(drawn.sort().values, grid.sort().values) and not torch.equal(drawn, grid)
    assert set(forward.sample_timesteps(50, generator, "grid", grid=grid[:2]).tolist()) == set(grid[:2].tolist())


@pytest.mark.parametrize("time_seed", [None, 5])
def test_draws_of_a_sample_depend_on_its_seed_alone(time_seed):
    forward = process("flow")
    x0 = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0))
    together = list(forward.noised(x0, [7, 8, 9], 4, time_seed=time_seed))
    alone = list(forward.noised(x0[1:2], [8], 4, time_seed=time_seed))
    assert len(together) == len(alone) == 4
    for many, one in zip(together, alone):
        assert all(torch.equal(mine[1:2], its) for mine, its in zip(many, one))
    x_t, t, noise = together[0]
    assert torch.equal(x_t, forward.add_noise(x0, noise, t)) and not torch.equal(noise[0], noise[1])
    assert (len(set(t.tolist())) == 1) == (time_seed is not None)
    assert len({int(row[1][0] // 250) for row in together}) == 4, "one time in each quarter"


@pytest.mark.parametrize("kind", PROCESSES)
def test_weights_convert_errors_exactly(kind):
    forward = PROCESSES[kind]
    x0, noise, output, x_t = noised(forward)
    native, t = matching_error(output, forward.target(x0, noise, TIMES)), TIMES.double()
    for weighting, implied in (("eps", (forward.to_noise(output, x_t, t), noise)), ("x0", (forward.to_x0(output, x_t, t), x0)), ("native", None)):
        expected = matching_error(*implied) if implied else native
        torch.testing.assert_close(forward.error_weight(t, weighting) * native, expected, rtol=1e-8, atol=0)
    with pytest.raises(ValueError, match=", ".join(WEIGHTINGS)):
        forward.error_weight(t, "snr")


@pytest.mark.parametrize("kind", SIGMA_SPACE)
def test_weights_convert_errors_exactly_in_sigma_space(kind):
    forward = process(kind)
    x0, noise, output, t = draw(forward)
    x_t, native = forward.add_noise(x0, noise, t), matching_error(output, forward.target(x0, noise, t))
    for weighting, implied in (("eps", (forward.to_noise(output, x_t, t), noise)), ("x0", (forward.to_x0(output, x_t, t), x0))):
        torch.testing.assert_close(forward.error_weight(t.double(), weighting) * native, matching_error(*implied), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["SVD", "EDM"])
def test_elbo_of_continuous_times_is_the_derivative_of_the_snr(kind):
    forward = process(kind)
    low, high = forward.scheduler.time_range
    t = torch.linspace(low, high, 7, dtype=torch.float64)[1:-1]
    slope = 8 * forward.snr(t) * (high - low)  # sigma = exp(4 t)
    torch.testing.assert_close(forward.error_weight(t, "elbo") / forward.error_weight(t, "x0"), slope / 2, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_elbo_of_a_table_is_the_kl_of_the_posterior(kind):
    forward, t = PROCESSES[kind], TIMES.double()
    cumprod = forward.scheduler.alphas_cumprod.double()
    now, before = cumprod[t.long()], cumprod[t.long() - 1]
    beta = 1 - now / before
    mean_weight, variance = before.sqrt() * beta / (1 - now), (1 - before) / (1 - now) * beta
    expected = 1000 * mean_weight.square() / (2 * variance)  # of the squared x0 error: KL of Gaussians of one variance
    torch.testing.assert_close(forward.error_weight(t, "elbo") / forward.error_weight(t, "x0"), expected, rtol=1e-6, atol=0)
    assert forward.error_weight(torch.zeros(1), "elbo") == 0


@pytest.mark.parametrize("kind", ["flow", "inverted flow"])
def test_elbo_of_a_flow_is_the_derivative_of_the_snr(kind):
    forward, t, h = PROCESSES[kind], TIMES[1:4].double(), 1e-3
    slope = (forward.snr(t + h) - forward.snr(t - h)).abs() / (2 * h) * 1000
    torch.testing.assert_close(forward.error_weight(t, "elbo") / forward.error_weight(t, "x0"), slope / 2, rtol=1e-6, atol=0)
