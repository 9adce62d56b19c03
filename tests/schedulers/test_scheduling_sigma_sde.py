"""Ancestral steps along stock sigmas: the stock Euler step bit for bit without noise, the law of the forward process with it."""

import copy
import math

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EDMEulerScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from marginals import MEAN, VARIANCE, order, run_chain
from schedules import SD, gen, randn
from torch.distributions import Independent, Normal, kl_divergence

from diffusers_align import SigmaSDEScheduler, sde_twin
from diffusers_align.schedulers.sigma_space import implied_output

BETAS = {name: SD[name] for name in ("beta_start", "beta_end", "beta_schedule")}
KARRAS = {**BETAS, "use_karras_sigmas": True}
SVD = {**KARRAS, "prediction_type": "v_prediction", "timestep_type": "continuous", "timestep_spacing": "leading", "sigma_min": 0.002, "sigma_max": 700.0}
EULER = {
    "Karras": (EulerDiscreteScheduler, KARRAS),
    "Karras v": (EulerDiscreteScheduler, KARRAS | {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
    "Karras sample": (EulerDiscreteScheduler, KARRAS | {"prediction_type": "sample", "final_sigmas_type": "sigma_min"}),
    "exponential": (EulerDiscreteScheduler, BETAS | {"use_exponential_sigmas": True}),
    "beta": (EulerDiscreteScheduler, BETAS | {"use_beta_sigmas": True}),
    "log-linear": (EulerDiscreteScheduler, BETAS | {"interpolation_type": "log_linear"}),
    "zero SNR": (EulerDiscreteScheduler, KARRAS | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
    "SVD": (EulerDiscreteScheduler, SVD),
    "EDM": (EDMEulerScheduler, {}),
    "EDM v": (EDMEulerScheduler, {"sigma_schedule": "exponential", "prediction_type": "v_prediction", "sigma_data": 1.0}),
    "Cosmos": (EDMEulerScheduler, {"final_sigmas_type": "sigma_min"}),
}
# Solvers whose own step is of another order.
OTHERS = {
    "Heun": ("HeunDiscreteScheduler", KARRAS),
    "KDPM2": ("KDPM2DiscreteScheduler", KARRAS),
    "KDPM2 ancestral": ("KDPM2AncestralDiscreteScheduler", KARRAS),
    "DPM-Solver++": ("DPMSolverMultistepScheduler", KARRAS),
    "DPM-Solver++ SDE": ("DPMSolverMultistepScheduler", KARRAS | {"algorithm_type": "sde-dpmsolver++"}),
    "DPM-Solver++ Lu": ("DPMSolverMultistepScheduler", BETAS | {"use_lu_lambdas": True}),
    "DPM-Solver++ clipped": ("DPMSolverMultistepScheduler", BETAS | {"lambda_min_clipped": -2.0}),
    "DPM-Solver single": ("DPMSolverSinglestepScheduler", KARRAS | {"lower_order_final": True}),
    "UniPC": ("UniPCMultistepScheduler", KARRAS),
    "UniPC exponential": ("UniPCMultistepScheduler", BETAS | {"use_exponential_sigmas": True, "prediction_type": "v_prediction"}),
    "DEIS": ("DEISMultistepScheduler", KARRAS),
    "SA-Solver": ("SASolverScheduler", KARRAS),
    "EDM DPM-Solver++": ("EDMDPMSolverMultistepScheduler", {"sigma_data": 1.0}),
}


def stock_of(name: str):
    if name == "beta":
        pytest.importorskip("scipy")
    cls, config = EULER[name] if name in EULER else (getattr(diffusers, OTHERS[name][0]), OTHERS[name][1])
    return cls(**config)


def twin_of(stock, steps: int = 8, **fields) -> SigmaSDEScheduler:
    twin = sde_twin(stock, **fields)
    assert type(twin) is SigmaSDEScheduler
    twin.set_timesteps(steps)
    return twin


# --- the schedule, and the step without noise ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", EULER)
@pytest.mark.parametrize("off", ["eta", "deterministic"])
def test_without_noise_the_step_is_the_stock_one_bit_for_bit(name, off, dtype):
    stock = stock_of(name)
    twin = twin_of(stock, eta=0.0 if off == "eta" else 1.0)
    twin.deterministic = off == "deterministic"
    stock.set_timesteps(8)
    assert torch.equal(twin.timesteps, stock.timesteps) and torch.equal(twin.sigmas, stock.sigmas) and twin.init_noise_sigma == stock.init_noise_sigma
    assert not twin.stochastic_steps.any()
    x = y = (randn(0) * stock.init_noise_sigma.__float__()).to(dtype)
    for t in stock.timesteps:
        mine, theirs = twin.scale_model_input(x, t), stock.scale_model_input(y, t)
        assert torch.equal(mine, theirs)
        out = twin.step(torch.tanh(mine), t, x)
        x, y = out.prev_sample, stock.step(torch.tanh(theirs), t, y).prev_sample
        assert torch.equal(x, y) and x.dtype == dtype and out.log_prob is None
    assert twin.step_index == stock.step_index


def test_beyond_1_a_flow_scheduler_walks_in_sigma_space():
    """As Cosmos 2 does: it hands the derivative of an exploding state to the scheduler, which is the noise."""
    stock = diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    stock.register_to_config(sigma_min=0.002, sigma_max=80.0)
    twin = twin_of(stock)
    stock.set_timesteps(8)
    twin.deterministic = True
    x = y = 80 * randn(0)
    for t in stock.timesteps:
        x, y = (s.step(torch.tanh(z), t, z).prev_sample for s, z in ((twin, x), (stock, y)))
        assert torch.equal(x, y)
    clean, k = randn(1), 3
    x = clean + stock.sigmas[k] * randn(2)
    twin.deterministic = False
    torch.testing.assert_close(twin.clean_sample(k, randn(2), x), clean, rtol=0, atol=1e-5)
    twin.sigmas[-1] = twin.sigmas[-2]  # the pipeline writes there
    assert twin.kernel(7) == (1.0, 0.0, 0.0), "a step to the same noise changes nothing"


@pytest.mark.parametrize("schedule", ["scaled_linear", "exp"])
def test_clean_samples_are_clipped_where_the_source_clips_them(schedule):
    """As Heun's scheduler does; its betas may be of a kind that Euler's does not know."""
    config = {"beta_schedule": schedule, "prediction_type": "sample", "use_karras_sigmas": True, "clip_sample": True, "clip_sample_range": 0.5}
    stock = diffusers.HeunDiscreteScheduler(**config)
    twin, x, output = twin_of(stock, 4, eta=0.0), randn(1), 2 * randn(2)
    stock.set_timesteps(4)
    torch.testing.assert_close(twin.sigmas, stock.sigmas[[0, 1, 3, 5, 7]])
    expected = stock.step(output, stock.timesteps[0], x)  # Heun's first half is Euler's step
    actual = twin.step(output, twin.timesteps[0], x)
    torch.testing.assert_close(actual.prev_sample, expected.prev_sample)
    torch.testing.assert_close(actual.pred_original_sample, output.clamp(-0.5, 0.5))
    drawn = twin_of(stock, 4).transition(output, twin.timesteps[1], x)
    assert drawn.std.min() > 0 and torch.equal(drawn.mean, twin_of(stock, 4).transition(output.clamp(-0.5, 0.5), twin.timesteps[1], x).mean)
    other = sde_twin(EulerDiscreteScheduler.from_config(stock.config, beta_schedule="linear", trained_betas=stock.betas.tolist()))
    other.set_timesteps(4)
    assert other.clean_sample(0, output, x).abs().max() > 0.5, "another class's entry, which this one only hands on"


@pytest.mark.parametrize("name", OTHERS)
def test_other_solvers_are_walked_along_their_own_levels(name):
    stock = stock_of(name)
    twin = twin_of(stock)
    stock.set_timesteps(8)
    whole = stock.order == 1
    kept = slice(None) if whole else torch.tensor([0, *range(1, len(stock.timesteps), 2)])  # of a pair one
    if "ancestral" not in name:
        torch.testing.assert_close(twin.sigmas[:-1], stock.sigmas[:-1][kept].float())
    if whole:
        assert torch.equal(twin.timesteps, stock.timesteps) and float(twin.init_noise_sigma) == float(stock.init_noise_sigma)
        t = stock.timesteps[0]
        assert torch.equal(twin.scale_model_input(randn(0), t), stock.scale_model_input(randn(0), t))
    x = randn(0) * float(twin.init_noise_sigma)
    for k, t in enumerate(twin.timesteps):
        out = twin.step(torch.tanh(twin.scale_model_input(x, t)), t, x, generator=gen(k))
        x = out.prev_sample
        assert x.isfinite().all() and (out.log_prob is not None) == bool(twin.stochastic_steps[k])
    assert twin.stochastic_steps[:-1].all()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_without_noise_a_state_that_keeps_its_variance_takes_the_first_order_step(prediction_type):
    """Of DPM-Solver++, which is DDIM's."""
    config = KARRAS | {"solver_order": 1, "prediction_type": prediction_type}
    stock, x, y = DPMSolverMultistepScheduler(**config), randn(0), randn(0)
    twin = twin_of(stock, eta=0.0)
    stock.set_timesteps(8)
    for t in stock.timesteps:
        x, y = (s.step(torch.tanh(z), t, z).prev_sample for s, z in ((twin, x), (stock, y)))
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


# --- the kernel ------------------------------------------------------------------------------------------------------------


def test_with_noise_the_step_is_eulers_ancestral_one():
    """On the table, where diffusers has it."""
    stock = EulerAncestralDiscreteScheduler(**BETAS)
    twin = SigmaSDEScheduler(**BETAS)
    for scheduler in (stock, twin):
        scheduler.set_timesteps(8)
    x = y = randn(0) * stock.init_noise_sigma
    for k, t in enumerate(stock.timesteps):
        mine = twin.step(torch.tanh(twin.scale_model_input(x, t)), t, x, generator=gen(k))
        theirs = stock.step(torch.tanh(stock.scale_model_input(y, t)), t, y, generator=gen(k)).prev_sample
        torch.testing.assert_close(mine.prev_sample, theirs, rtol=1e-4, atol=1e-4)
        x, y = mine.prev_sample, theirs


@pytest.mark.parametrize("name", EULER)
def test_a_window_is_noisy_inside_and_eulers_step_outside(name):
    inside, whole, none = (twin_of(stock_of(name), **fields) for fields in ({"sde_window": (2, 5)}, {}, {"eta": 0.0}))
    assert inside.stochastic_steps.tolist() == [2 <= k < 5 for k in range(8)]
    for k, t in enumerate(inside.timesteps):
        x, noisy = randn(k) * float(inside.sigmas[k]), 2 <= k < 5
        found, on, off = (s.step(torch.tanh(s.scale_model_input(x, t)), t, x, generator=gen(k)) for s in (inside, whole, none))
        assert torch.equal(found.prev_sample, (on if noisy else off).prev_sample) and (found.log_prob is not None) == noisy


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_in_both_coordinates_it_is_ddims_kernel(eta, prediction_type):
    config = BETAS | {"timestep_spacing": "trailing", "prediction_type": prediction_type}
    ddim = sde_twin(DDIMScheduler(**config, clip_sample=False), eta=eta)
    keeping = SigmaSDEScheduler(**config, eta=eta, source={"_class_name": "DPMSolverMultistepScheduler", **config})
    exploding = SigmaSDEScheduler(**config, eta=eta)
    for scheduler in (ddim, keeping, exploding):
        scheduler.set_timesteps(10)
    for k, t in enumerate(ddim.timesteps[:-1]):
        x, output = randn(0), randn(1)
        alpha, after = (float(ddim.alphas_cumprod[s]) ** 0.5 for s in ddim.timesteps[k : k + 2].tolist())
        expected, kept, grown = ddim.transition(output, t, x), keeping.transition(output, t, x), exploding.transition(output, t, x / alpha)
        for mean, std in ((kept.mean, kept.std), (after * grown.mean, after * grown.std)):
            torch.testing.assert_close(mean, expected.mean, rtol=1e-3, atol=2e-4)
            torch.testing.assert_close(std, expected.std, rtol=1e-4, atol=0)
        action = expected.sample(gen(k))
        assert torch.allclose(kept.log_prob(action), expected.log_prob(action), rtol=1e-3, atol=0.5)


@pytest.mark.parametrize("name", ["Karras", "SVD", "EDM", "UniPC"])
def test_the_log_probability_is_the_density_of_the_draw(name):
    twin, other = (twin_of(stock_of(name)) for _ in range(2))
    x = randn(0) * float(twin.init_noise_sigma)
    for t in twin.timesteps[:-1]:
        output = torch.tanh(twin.scale_model_input(x, t))
        here, there = twin.transition(output, t, x), other.transition(output + 0.1, t, x)
        out = twin.step(output, t, x, generator=gen())
        p, q = (Independent(Normal(kernel.mean.double(), kernel.std.double().expand_as(kernel.mean)), 3) for kernel in (here, there))
        torch.testing.assert_close(out.log_prob, p.log_prob(out.prev_sample.double()), rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(here.kl(there), kl_divergence(p, q), rtol=1e-4, atol=1e-4)
        assert torch.equal(out.prev_sample_mean, here.mean) and torch.equal(out.std, here.std)
        forced = twin_of(stock_of(name))
        forced._step_index = twin.step_index - 1
        assert torch.equal(forced.step(output, t, x, prev_sample=out.prev_sample).log_prob, out.log_prob)
        x = out.prev_sample


# --- the law ---------------------------------------------------------------------------------------------------------------


def chain(name: str, eta: float, steps: int):
    """Mean, variance and memory after a chain on Gaussian data, whose perfect denoiser is known, from the true marginal of the first sigma; and of the last
    sigma the true moments."""
    twin = twin_of(stock_of(name), steps, eta=eta)
    probe, space = torch.tensor([[0.0], [1.0]]), twin.space

    def moments(sigma):
        alpha = float(space.alpha(torch.tensor(sigma, dtype=torch.float64)))
        return alpha, alpha * MEAN, alpha**2 * (VARIANCE + sigma**2)

    def affine(k):
        sigma = float(twin.sigmas[k])
        alpha, _, _ = moments(sigma)
        clean = MEAN + VARIANCE / (VARIANCE + sigma**2) * (probe / alpha - MEAN)
        state, output = (float(w) for w in space.clean_weights(torch.tensor(sigma, dtype=torch.float64)))
        answer = ((clean.double() - state * probe) / output).float()
        twin._step_index = k
        transition = twin.transition(answer, twin.timesteps[k], probe)
        offset = transition.mean[0].item()
        return transition.mean[1].item() - offset, offset, transition.std.item()

    sigmas = twin.sigmas.tolist()
    last = max(k for k in range(steps) if sigmas[k] > 0.02)  # beyond, float32 has no more digits than the data
    return run_chain(*moments(sigmas[0])[1:], (affine(k) for k in range(last))), moments(sigmas[last])[1:]


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["Karras", "Karras v", "exponential", "EDM", "UniPC", "DPM-Solver++ Lu"])
def test_marginals_are_those_of_the_forward_process(name, eta):
    steps = (40, 80, 160)
    chains = [chain(name, eta, number) for number in steps]
    errors = [variance / target[1] - 1 for (_, variance, _), target in chains]
    assert 0.8 < order(steps, errors) < 1.3, f"order {order(steps, errors):.2f}, errors {errors}"
    assert abs(errors[-1]) < 0.08 and max(abs(mean - target[0]) for (mean, _, _), target in chains) < 5e-3


def test_memory_is_that_of_the_forward_process():
    """With eta = 1 the chain is the reversed noising, whose correlation is known; the ODE forgets nothing."""
    (_, _, ancestral), _ = chain("Karras", 1.0, 500)
    (_, _, ode), _ = chain("Karras", 0.0, 500)
    assert ancestral == pytest.approx(math.sqrt(VARIANCE / (VARIANCE + 14.6146**2)), rel=0.05) and ode == pytest.approx(1.0, abs=1e-3)


# --- single evaluations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["Karras", "SVD", "EDM"])
def test_at_a_time_of_the_schedule_an_evaluation_has_its_scale_bit_for_bit(name, dtype):
    twin, x = twin_of(stock_of(name)), randn(0).to(dtype)
    at = twin.timesteps.clone()
    expected = []
    for t in at[:3]:
        expected.append(twin.scale_model_input(x, t))
        twin.skip_step(t)
    for k in range(3):
        twin.set_timesteps(8)
        twin.stand_in(at[k].expand(2))
        assert torch.equal(twin.scale_model_input(x, at[k]), expected[k])
    twin.set_timesteps(8)
    twin.stand_in(at[:2].expand(3, 2))  # each sample at its own time
    own = twin.scale_model_input(x, at[:2])
    assert own.dtype == dtype and torch.equal(own, torch.cat([expected[0][:1], expected[1][1:]]))


def test_between_the_times_of_the_schedule_the_level_follows_the_time():
    twin = twin_of(EulerDiscreteScheduler(**SVD))
    twin.stand_in(torch.tensor([0.0, 0.0]))
    assert twin.sigmas[0] == 1.0 and torch.allclose(twin.scale_model_input(randn(0), torch.tensor(0.0)), randn(0) / math.sqrt(2))


def test_of_several_steps_with_one_time_the_position_counts():
    """Levels below the noise of the training are all told as timestep 0."""
    twin = twin_of(EulerDiscreteScheduler(**KARRAS, sigma_min=0.001, sigma_max=10.0), 8)
    assert twin.timesteps[-2:].tolist() == [0, 0]
    assert twin.step_position(torch.tensor(0.0)) == 6
    twin._step_index = 7
    assert twin.step_position(torch.tensor(0.0)) == 7
    with pytest.raises(ValueError, match="not one of the scheduler's 8 timesteps"):
        twin.step_position(3.5)


# --- what pipelines ask --------------------------------------------------------------------------------------------------------


def test_a_pipeline_may_ask_for_clean_samples_first_and_hand_guided_ones_in():
    """As Cosmos does: the step that asks is taken back."""
    stock, x = EDMEulerScheduler(), 80 * randn(0)
    twin = twin_of(stock)
    stock.set_timesteps(8)
    t, output = stock.timesteps[0], randn(1)
    twin.scale_model_input(x, t), stock.scale_model_input(x, t)
    asked, theirs = (method(output, t, x, return_dict=False) for method in (twin.ask, stock.step))
    assert torch.equal(asked[1], theirs[1]) and twin.step_index == 1
    twin._step_index -= 1
    guided = 2 * asked[1]
    raw = implied_output(twin, guided, x)
    handed, read = (copy.deepcopy(twin).step(raw, t, x, generator=gen(), **given) for given in ({"pred_original_sample": guided}, {}))
    torch.testing.assert_close(handed.prev_sample, read.prev_sample, rtol=0, atol=1e-4)
    assert torch.equal(handed.pred_original_sample, guided)


def test_what_else_is_asked_is_answered_by_the_scheduler_that_it_stands_for():
    twin = twin_of(EDMEulerScheduler(sigma_data=0.7))
    assert twin.config.sigma_data == 0.7 and twin.config.rho == 7.0
    assert torch.equal(twin.precondition_inputs(randn(0), 2.0), EDMEulerScheduler(sigma_data=0.7).precondition_inputs(randn(0), 2.0))
    with pytest.raises(AttributeError, match="'SigmaSDEScheduler' object has no attribute 'no_such_thing'"):
        twin.no_such_thing  # noqa: B018
    with pytest.raises(ValueError, match="EDMDPMSolverMultistepScheduler takes no sigmas of one's own"):
        sde_twin(diffusers.EDMDPMSolverMultistepScheduler()).set_timesteps(sigmas=[3.0, 1.0])


@pytest.mark.parametrize("name", ["Karras", "UniPC", "Cosmos"])
def test_noise_is_added_as_the_stock_scheduler_adds_it(name):
    stock = stock_of(name)
    twin = twin_of(stock)
    stock.set_timesteps(8)
    t = stock.timesteps[3:4].expand(2)
    for begin in (None, 3):
        for scheduler in (stock, twin) if begin else ():
            scheduler.set_begin_index(begin)
        assert torch.equal(twin.add_noise(randn(0), randn(1), t), stock.add_noise(randn(0), randn(1), t))


def test_img2img_begins_where_the_stock_scheduler_begins():
    stock = stock_of("Karras")
    twin = twin_of(stock)
    stock.set_timesteps(8)
    for scheduler in (twin, stock):
        scheduler.set_begin_index(3)
        scheduler.scale_model_input(randn(0), scheduler.timesteps[3])
    assert twin.step_index == stock.step_index == 3


# --- configs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Karras", "SVD", "EDM", "UniPC", "Heun"])
def test_a_saved_twin_is_the_same_one(name, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(diffusers.configuration_utils.logger, "warning", said.append)
    twin = twin_of(stock_of(name), eta=0.4)
    twin.save_pretrained(tmp_path)
    for again in (SigmaSDEScheduler.from_pretrained(tmp_path), sde_twin(twin), copy.deepcopy(twin)):
        again.set_timesteps(8)
        assert again.config.eta == 0.4 and torch.equal(again.sigmas, twin.sigmas) and torch.equal(again.timesteps, twin.timesteps)
        assert [again.kernel(k) for k in range(8)] == [twin.kernel(k) for k in range(8)]
    assert sde_twin(twin, eta=0.9).config.eta == 0.9 and said == []


def test_a_copy_has_a_schedule_of_its_own():
    twin = twin_of(EDMEulerScheduler())
    child = copy.deepcopy(twin)
    child.set_timesteps(3)
    assert len(twin.timesteps) == 8 and len(twin._source.timesteps) == 8


@pytest.mark.parametrize("eta", [-0.1, 1.1])
def test_impossible_eta_is_refused(eta):
    with pytest.raises(ValueError, match="eta must be a finite number, from 0 to 1"):
        SigmaSDEScheduler(eta=eta)
