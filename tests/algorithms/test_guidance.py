"""Guidance in closed form: conversions, norms, smoothing, schedules, and what a guided ODE arrives at."""

import math

import pytest
import torch

from diffusers_align.algorithms.guidance import (
    PRESETS,
    VELOCITY_SCHEDULES,
    Guidance,
    Level,
    clean_change,
    clean_estimate,
    guide,
    normalised,
    output_change,
    preset,
    renoised,
    smoothed,
    step_weights,
)

torch.set_num_threads(1)
DOUBLE = {"dtype": torch.float64}
VARIANCE_PRESERVING = [Level(math.cos(a), math.sin(a)) for a in (0.1, 0.7, 1.5)]
FLOW = [Level(1 - s, s) for s in (0.05, 0.5, 0.98)]


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **DOUBLE)


def outputs(x0, noise, level):
    """What a model of each parametrisation answers for this clean sample and noise."""
    return {"epsilon": noise, "sample": x0, "v_prediction": level.alpha * noise - level.sigma * x0, "flow": noise - x0}


# --- conversions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["flow", "epsilon", "v_prediction"])
def test_no_output_moves_a_state_without_noise(prediction):
    """Some schedules end with a step from 0 to 0."""
    x0, clean = numbers(3, 5), Level(1.0, 0.0)
    change = output_change(clean_change(numbers(3, 5, seed=1), clean), clean, prediction)
    assert torch.equal(change, torch.zeros(3, 5, dtype=x0.dtype))
    torch.testing.assert_close(clean_estimate(numbers(3, 5, seed=2) + change, x0, clean, prediction), x0, rtol=0, atol=0)


@pytest.mark.parametrize("level", [*VARIANCE_PRESERVING, *FLOW])
def test_a_score_enters_every_parametrisation_exactly(level):
    alpha, sigma = level
    x0, noise, score = numbers(3, 5), numbers(3, 5, seed=1), numbers(3, 5, seed=2)
    x_t, change = alpha * x0 + sigma * noise, clean_change(score, level)
    moved = {"epsilon": -sigma * score, "sample": sigma**2 / alpha * score}
    moved |= {"v_prediction": -sigma / alpha * score} if level in VARIANCE_PRESERVING else {"flow": -sigma / (1 - sigma) * score}
    for prediction, expected in moved.items():
        output = outputs(x0, noise, level)[prediction]
        torch.testing.assert_close(clean_estimate(output, x_t, level, prediction), x0, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(output_change(change, level, prediction), expected, rtol=1e-12, atol=1e-12)
        after = clean_estimate(output + expected, x_t, level, prediction)
        torch.testing.assert_close(after, x0 + change, rtol=1e-12, atol=1e-12)


def test_conversions_agree_with_the_forward_process_of_training():
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    from diffusers_align.forward_process import ForwardProcess
    from diffusers_align.schedulers import sde_twin

    stock = [DDIMScheduler(prediction_type=p, clip_sample=False) for p in ("epsilon", "v_prediction", "sample")]
    for scheduler in [*stock, FlowMatchEulerDiscreteScheduler(shift=3.0)]:
        process = ForwardProcess(sde_twin(scheduler))
        t, x_t, output = torch.tensor([300.0] * 2, **DOUBLE), numbers(2, 4), numbers(2, 4, seed=1)
        level = Level(float(process.alpha(t)[0]), float(process.sigma(t)[0]))
        expected = process.to_x0(output, x_t, t)
        torch.testing.assert_close(clean_estimate(output, x_t, level, process.prediction_type), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("level", [*VARIANCE_PRESERVING, *FLOW])
def test_the_score_is_the_velocity_schedule_of_that_name(level):
    gradient, s = numbers(2, 3), level.sigma / sum(level)
    by_velocity = level.sigma * VELOCITY_SCHEDULES["score"](s) * gradient
    torch.testing.assert_close(clean_change(gradient, level), by_velocity, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("schedule", VELOCITY_SCHEDULES)
def test_schedules_of_the_velocity_are_those_of_feng_et_al(schedule):
    sigma, gradient = 0.3, numbers(2, 3)
    t = 1 - sigma  # theirs rises to the data
    theirs = {
        "constant": 1,
        "linear": 1 - t,
        "cosine": math.cos(math.pi * t / 2),
        "exponential": math.exp(-t),
        "score": 1 / t - 1,
        "score_squared": (1 / t - 1) ** 2,
    }
    level = Level(1 - sigma, sigma)
    velocity = output_change(clean_change(gradient, level, schedule), level, "flow")
    torch.testing.assert_close(velocity, -theirs[schedule] * gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("levels", [VARIANCE_PRESERVING, FLOW])
def test_noising_back_gives_the_earlier_marginal(levels):
    level_next, level = levels[0], levels[1]
    zero, one = torch.zeros(1, **DOUBLE), torch.ones(1, **DOUBLE)
    signal = renoised(level_next.alpha * one, level, level_next, zero)
    variance = renoised(level_next.sigma * one, level, level_next, zero) ** 2 + renoised(zero, level, level_next, one) ** 2
    torch.testing.assert_close(signal, level.alpha * one, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(variance, level.sigma**2 * one, rtol=1e-12, atol=1e-12)


# --- parts of the engine -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["unit", "rms", "dps"])
def test_norms_are_of_each_sample_by_itself(norm):
    gradient, value = numbers(3, 2, 4), torch.tensor([-4.0, 0.25, -1.0], **DOUBLE)
    together = normalised(gradient, norm, value, 0.3)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], normalised(gradient[i : i + 1], norm, value[i : i + 1], 0.3))
    length = {"unit": 1.0, "rms": 0.3 * math.sqrt(8), "dps": float(gradient[0].norm()) / 4}[norm]
    assert float(together[0].norm()) == pytest.approx(length, rel=1e-12)


def test_dps_norm_is_the_gradient_of_the_residuals_length():
    x, y = numbers(2, 5).requires_grad_(), numbers(2, 5, seed=1)
    value = -(y - x).square().sum(1)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    (expected,) = torch.autograd.grad(-(y - x).norm(dim=1).sum(), x)
    torch.testing.assert_close(normalised(gradient, "dps", value.detach(), 1.0), expected, rtol=1e-12, atol=1e-12)


def evaluating(energy):
    def evaluate(x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = energy(x)
            return value.detach(), torch.autograd.grad(value.sum(), x)[0]

    return evaluate


def test_smoothing_is_the_gradient_of_the_log_mean_exponential():
    noises, scale = [numbers(2, 3, seed=s) for s in range(1, 5)], 1.7

    def energy(x):
        return (x**3).sum(1).sin()

    x = numbers(2, 3).requires_grad_()
    expected = (torch.stack([scale * energy(x + noise) for noise in noises]).exp().mean(0).log() / scale).sum()
    value, gradient = smoothed(evaluating(energy), x.detach(), noises, scale)
    torch.testing.assert_close(value.sum(), expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, x)[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(smoothed(evaluating(energy), x.detach(), [], scale)[1], evaluating(energy)(x.detach())[1])


@pytest.mark.parametrize("schedule", ["constant", "increase", "decrease"])
def test_weights_of_the_guided_steps_have_mean_one(schedule):
    levels = [Level(1 - s, s) for s in (1.0, 0.75, 0.5, 0.25, 0.0)]
    weights = step_weights(levels, schedule, range(1, 4))
    assert weights[0] == 0 and sum(weights) == pytest.approx(3)
    assert {"constant": weights[1] == weights[3], "increase": weights[1] < weights[3], "decrease": weights[1] > weights[3]}[schedule]


@pytest.mark.parametrize("iterations", [1, 3])
def test_mean_guidance_descends_a_quadratic_as_it_must(iterations):
    target, x0 = numbers(2, 4, seed=1), numbers(2, 4)
    evaluate = evaluating(lambda x: -(x - target).square().sum(1) / 2)
    levels = (Level(0.6, 0.8), Level(0.8, 0.6))
    distance = (target - x0) * (1 - 0.9**iterations)
    for entry, clean, state in (("output", 1.0, 0.0), ("state", 0.0, 1.0), ("renoised", 0.0, 0.8)):
        shift = guide(Guidance(mean=0.1, iterations=iterations, mean_entry=entry), evaluate, x0, x0, levels, scale=1.0)
        torch.testing.assert_close(shift.clean, clean * distance, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(shift.state, state * distance, rtol=1e-12, atol=1e-12)


def test_variance_guidance_is_of_the_state_before_or_after_the_step():
    """TFG's x' = Step(x) + Delta / sqrt(abar / abar'), of the same sign and shape as DPS's."""
    evaluate, pull = evaluating(lambda x: -(x**2).sum(1) / 2), {"pull_back": lambda gradient: 3 * gradient}
    x0, levels = numbers(2, 4), (Level(0.6, 0.8), Level(0.75, 0.66))
    for entry, factor in (("state", 1.0), ("renoised", 1.25)):
        shift = guide(Guidance(variance=0.1, variance_entry=entry, variance_schedule="constant"), evaluate, x0, x0, levels, scale=2.0, **pull)
        torch.testing.assert_close(shift.state, -0.6 * factor * x0, rtol=1e-12, atol=1e-12)
        assert not shift.clean.any()
    assert preset("tfg").variance_entry == "renoised" and {preset(name).variance_entry for name in ("dps", "lgd_mc", "freedom")} == {"state"}


def test_blending_differentiates_both_ways_to_the_state():
    level, weight = Level(0.8, 0.6), numbers(3, 3, seed=4)
    x_t = numbers(2, 3).requires_grad_()
    x0 = (x_t @ weight).sin()
    blend = level.sigma * x0 + (1 - level.sigma) * x_t
    (expected,) = torch.autograd.grad((blend**2).sum(), x_t, retain_graph=True)
    shift = guide(
        preset("clip_guided"), evaluating(lambda x: (x**2).sum(1)), x_t.detach(), x0.detach(), (level, Level(1.0, 0.0)), scale=1.0,
        pull_back=lambda g: torch.autograd.grad(x0, x_t, g)[0],
    )  # fmt: skip
    torch.testing.assert_close(shift.clean, clean_change(expected, level), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "Nothing guides"),
        ({"mean": 1, "norm": "l1"}, "Unknown norm"),
        ({"mean": 1, "start": 0.5, "stop": 0.5}, "window"),
        ({"mean": 1, "draws": 0}, "at least 1"),
        ({"variance": 1, "variance_entry": "state"}, "Unknown variance_schedule"),
        ({"noisy": 1, "mean": 1}, "one kind"),
    ],
)
def test_settings_that_mean_nothing_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Guidance(**fields)
    with pytest.raises(ValueError, match="flowchef"):
        preset("magic")


# --- what a guided ODE arrives at: N(0.7, 0.6^2) tilted by -(x - 0.2)^2 --------------------------------------------------

MEAN, DEVIATION, PLACE, STEPS = 0.7, 0.6, 0.2, 400


def arrival(guidance, scale=1.0, exact=False, steps=STEPS):
    """Mean and deviation of the guided Euler solution: the flow of a Gaussian under a quadratic energy is affine."""
    x = torch.tensor([[0.0], [1.0]], **DOUBLE)
    for k in range(steps):
        level, level_next = (Level(k_ / steps, 1 - k_ / steps) for k_ in (k, k + 1))
        variance = (level.alpha * DEVIATION) ** 2 + level.sigma**2
        slope = level.alpha * DEVIATION**2 / variance
        x0 = MEAN + slope * (x - level.alpha * MEAN)
        posterior = DEVIATION**2 * level.sigma**2 / variance

        def exact_energy(x_t):
            clean = MEAN + slope * (x_t - level.alpha * MEAN)
            return -scale * ((clean - PLACE) ** 2).sum(1) / (1 + 2 * scale * posterior) / scale

        plug_in = evaluating(lambda clean: -((clean - PLACE) ** 2).sum(1))
        velocity, state = (x - x0) / level.sigma, torch.zeros_like(x)
        if k > 0:
            shift = guide(
                guidance, evaluating(exact_energy) if exact else plug_in, x, x0, (level, level_next), scale=scale, pull_back=lambda g: slope * g
            )  # fmt: skip
            velocity, state = velocity + output_change(shift.clean, level, "flow"), shift.state
        x = x - velocity / steps + state
    return float(x[0]), float(x[1] - x[0])


def test_the_exact_score_of_the_tilt_reaches_it_to_first_order():
    precision = 1 / DEVIATION**2 + 2
    target = (MEAN / DEVIATION**2 + 2 * PLACE) / precision, precision**-0.5
    assert target == pytest.approx((0.4907, 0.4575), abs=1e-4)
    found = [arrival(preset("classifier"), exact=True, steps=n) for n in (100, 200, 400)]
    errors = [max(abs(a - b) for a, b in zip(reached, target)) for reached in found]
    assert errors[2] < 2e-3
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.3) and errors[1] / errors[2] == pytest.approx(2, abs=0.3)


def test_the_plug_in_guides_too_far_by_the_recorded_bias():
    assert arrival(preset("energy")) == pytest.approx((0.4155, 0.4169), abs=1e-4)
    assert arrival(preset("energy"), steps=800) == pytest.approx((0.4155, 0.417), abs=3e-3)  # the bias does not go away with more steps


# mpgd's strength is that of a step, and there are a hundred; the others' is that of the tilt.
@pytest.mark.parametrize("name, unit", [("energy", 0.2), ("flow", 0.2), ("mpgd", 0.005), ("classifier", 0.2)])
def test_guidance_climbs_and_its_opposite_descends(name, unit):
    def energy(scale):
        mean, deviation = arrival(preset(name), scale, exact=name == "classifier", steps=100)
        return -((mean - PLACE) ** 2) - deviation**2

    plain = -((MEAN - PLACE) ** 2) - DEVIATION**2
    assert energy(2 * unit) > energy(unit) > plain + 0.01 > energy(-unit) + 0.02


def test_mpgd_moves_the_clean_estimate_and_keeps_the_noise_as_algorithm_1_does():
    """A DDIM step by hand, in the official order: estimate and noise, the estimate moves, then both make the next state."""
    generator = torch.Generator().manual_seed(0)
    x_t, output = (torch.randn(2, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    level, after, target = Level(0.6, 0.8), Level(0.8, 0.6), torch.full((2, 5), 0.3, dtype=torch.float64)
    x0 = (x_t - 0.8 * output) / 0.6
    gradient = 2 * (target - x0)
    moved = 0.7 * 0.8 * gradient / gradient.norm(dim=1, keepdim=True) * 5**0.5
    expected = 0.8 * (x0 + moved) + 0.6 * output
    evaluate = lambda x: (-(x - target).square().sum(1), 2 * (target - x))  # noqa: E731
    shift = guide(preset("mpgd"), evaluate, x_t, x0, (level, after), scale=0.7)
    stepped = after.alpha * (x0 + shift.clean) + after.sigma * (output + output_change(shift.clean, level, "epsilon")) + shift.state
    torch.testing.assert_close(stepped, expected, rtol=1e-12, atol=1e-12)


def test_every_preset_is_one_of_the_engines():
    assert len(PRESETS) == 12
    assert all(isinstance(guidance, Guidance) for guidance in PRESETS.values())
