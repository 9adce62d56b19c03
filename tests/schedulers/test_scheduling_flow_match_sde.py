"""The flow-matching scheduler with noise: published values, and the stock step, bit for bit, without."""

import math

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from schedules import STD, assert_same_loop, flow, gen, randn

from diffusers_align import FlowMatchSDEScheduler, sde_twin
from diffusers_align.schedulers import KERNELS

SIGMAS = [1, 0.96013, 0.91335, 0.85769, 0.79037, 0.70728, 0.60215, 0.46488, 0.27805, 0.00893, 0]


VECTOR = {  # mean, std, log-density summed over the four dimensions, at solver step 4
    "flow_grpo": ([0.851168, -1.909230, 0.554893, 0.194689], 0.391794, -0.060709),
    "dance_grpo": ([0.953228, -2.074620, 0.581716, 0.223593], 0.086476, 5.823728),
    "cps": ([0.418512, -1.208106, 0.441182, 0.072159], 0.672662, 4 * -0.817712),
}


# Flow matching: values


@pytest.mark.parametrize("sde_type", STD)
def test_flow_schedule_and_stds_have_the_published_values(sde_type):
    scheduler = flow(sde_type)
    torch.testing.assert_close(scheduler.sigmas, torch.tensor(SIGMAS), rtol=0, atol=6e-6)
    assert [scheduler.kernel(k).std for k in range(10)] == pytest.approx(STD[sde_type], abs=6e-6)
    x, v = randn(0), randn(1)
    for k, t in enumerate(scheduler.timesteps):
        assert scheduler.transition(v, t, x).std.item() == pytest.approx(STD[sde_type][k], abs=6e-6)


@pytest.mark.parametrize("sde_type", VECTOR)
def test_flow_kernels_have_the_published_mean_and_density(sde_type):
    mean, std, log_prob = VECTOR[sde_type]
    scheduler = flow(sde_type)
    x, v, x_next = (torch.tensor([row]) for row in ([1, -2, 0.5, 0.25], [0.5, 1, -1, 0.3], [0.9, -2.1, 0.6, 0.2]))
    transition = scheduler.transition(v, scheduler.timesteps[4], x)
    torch.testing.assert_close(transition.mean, torch.tensor([mean]), rtol=0, atol=1e-6)
    assert transition.std.item() == pytest.approx(std, abs=1e-6)
    assert transition.log_prob(x_next).item() == pytest.approx(log_prob, abs=5e-6)


@pytest.mark.parametrize("steps", [4, 10, 28])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("noise_level", [0.3, 0.7, 1.0])
def test_first_std_of_flow_grpo_is_the_noise_level(noise_level, shift, steps):
    scheduler = flow(steps=steps, noise_level=noise_level, shift=shift)
    assert scheduler.sigmas[0] == 1
    assert scheduler.kernel(0).std == pytest.approx(noise_level, rel=1e-14)
    assert torch.equal(scheduler.transition(randn(0), scheduler.timesteps[0], randn(1)).std.flatten(), torch.tensor([noise_level]))


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler"])
def test_first_std_is_the_noise_level_where_the_schedule_starts_just_below_one(name):
    source = getattr(diffusers, name)(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    scheduler = sde_twin(source, sde_type="flow_grpo", noise_level=0.7)
    scheduler.set_timesteps(10)
    assert 0.999 < scheduler.sigmas[0] < 1
    assert scheduler.kernel(0).std == pytest.approx(0.7, rel=0.01)


@pytest.mark.parametrize("k", [1, 4, 8])
def test_memoryless_kernel_is_the_gaussian_posterior_of_its_noising_process(k):
    """Bayes' rule for x' given x and x_0, with x = a x' + sqrt(c) noise."""
    scheduler = flow("memoryless")
    sigma, following = scheduler.sigmas[k].item(), scheduler.sigmas[k + 1].item()
    a = (1 - sigma) / (1 - following)
    c = sigma**2 - (a * following) ** 2
    precision = 1 / following**2 + a**2 / c
    x, clean = 0.7, -0.4
    mean = ((1 - following) * clean / following**2 + a * x / c) / precision
    kernel = scheduler.kernel(k)
    assert kernel.x_weight * x + kernel.v_weight * (x - clean) / sigma == pytest.approx(mean, rel=1e-12)
    assert kernel.std == pytest.approx(precision**-0.5, rel=1e-12)


@pytest.mark.parametrize("k", [0, 4, 8])
def test_memoryless_em_has_the_offsets_of_the_paper(k):
    """Table 1 and appendix of Adjoint Matching, written in the paper's time t = 1 - sigma with h = dt."""
    scheduler = flow("memoryless_em")
    t, h = 1 - scheduler.sigmas[k].item(), (scheduler.sigmas[k] - scheduler.sigmas[k + 1]).item()
    kernel = scheduler.kernel(k)
    assert kernel.x_weight == pytest.approx(1 - h / (t + h), rel=1e-5, abs=1e-6)
    assert kernel.v_weight == pytest.approx(-2 * h, rel=1e-5)  # the paper's velocity is ours with the other sign
    assert kernel.std == pytest.approx((2 * (1 - t + h) / (t + h) * h) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("sde_type", ["memoryless", "memoryless_em", "cps"])
def test_last_step_is_deterministic(sde_type):
    scheduler = flow(sde_type)
    assert scheduler.stochastic_steps.tolist() == [True] * 9 + [False]
    scheduler.set_begin_index(9)
    out = scheduler.step(randn(0), scheduler.timesteps[9], randn(1))
    assert out.log_prob is None and out.std.flatten().tolist() == [0]
    torch.testing.assert_close(out.prev_sample, out.pred_original_sample)


@pytest.mark.parametrize("sde_type", ["memoryless", "memoryless_em"])
def test_memoryless_kernels_know_no_strength(sde_type):
    assert [flow(sde_type, noise_level=0.2).kernel(k) for k in range(10)] == [flow(sde_type, noise_level=5.0).kernel(k) for k in range(10)]


# Flow matching: the stock step, bit for bit


FLOW_CONFIGS = [
    {"shift": 1.0},
    {"shift": 3.0},
    {"shift": 1.0, "use_dynamic_shifting": True},
    {"shift": 1.0, "use_dynamic_shifting": True, "time_shift_type": "linear", "shift_terminal": 0.1},
    {"shift": 2.0, "use_karras_sigmas": True},
    {"shift": 1.0, "invert_sigmas": True},
]


@pytest.mark.parametrize("config", FLOW_CONFIGS)
@pytest.mark.parametrize("off", ["noise_level", "deterministic", "window"])
def test_flow_without_noise_is_the_stock_step_bit_for_bit(off, config):
    mu = 0.8 if config.get("use_dynamic_shifting") else None
    stock = FlowMatchEulerDiscreteScheduler(**config)
    stock.set_timesteps(7, mu=mu)
    for sde_type in KERNELS:
        extra = {"noise_level": {"noise_level": 0.0}, "deterministic": {}, "window": {"sde_window": (7, 9)}}[off]
        scheduler = FlowMatchSDEScheduler(**config, sde_type=sde_type, **extra)
        scheduler.deterministic = off == "deterministic"
        scheduler.set_timesteps(7, mu=mu)
        assert not scheduler.stochastic_steps.any()
        stock.set_timesteps(7, mu=mu)
        assert_same_loop(scheduler, stock)


@pytest.mark.parametrize("sde_type", KERNELS)
def test_deterministic_transitions_are_the_steps_that_are_taken(sde_type):
    scheduler = flow(sde_type, sde_window=(2, 10))
    for k, t in enumerate(scheduler.timesteps):
        x, v = randn(k), randn(k + 50)
        transition = scheduler.transition(v, t, x)
        out = scheduler.step(v, t, x, generator=gen())
        torch.testing.assert_close(out.prev_sample_mean, transition.mean, rtol=0, atol=1e-6)
        torch.testing.assert_close(out.std, transition.std, rtol=0, atol=0)
        assert (out.log_prob is not None) == bool(scheduler.stochastic_steps[k])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flow_bit_parity_holds_in_the_pipelines_dtype(dtype):
    scheduler, stock = flow(noise_level=0.0), FlowMatchEulerDiscreteScheduler(shift=3.0)
    stock.set_timesteps(10)
    x = y = randn(0, dtype=dtype)
    for k, t in enumerate(stock.timesteps):
        v = randn(k + 1, dtype=dtype)
        x, y = scheduler.step(v, t, x).prev_sample, stock.step(v, t, y).prev_sample
        assert x.dtype == y.dtype == dtype and torch.equal(x, y)


def test_window_is_noisy_inside_and_the_ode_outside():
    scheduler, stock = flow(sde_window=(2, 5)), FlowMatchEulerDiscreteScheduler(shift=3.0)
    stock.set_timesteps(10)
    assert scheduler.stochastic_steps.tolist() == [2 <= k < 5 for k in range(10)]
    for k, t in enumerate(scheduler.timesteps):
        x, v = randn(k), randn(k + 50)
        out, ode = scheduler.step(v, t, x, generator=gen(k)), stock.step(v, t, x).prev_sample
        if 2 <= k < 5:
            assert out.log_prob.shape == (2,) and out.std.item() == pytest.approx(STD["flow_grpo"][k], abs=6e-6)
            assert not torch.equal(out.prev_sample, ode)
        else:
            assert out.log_prob is None and out.std.item() == 0 and torch.equal(out.prev_sample, ode)


def test_noise_level_may_differ_from_step_to_step():
    levels = [0.1, 0.0, 0.5, 0.7, *[0.0] * 6]
    scheduler = flow("dance_grpo", noise_level=levels)
    assert scheduler.stochastic_steps.tolist() == [True, False, True, True] + [False] * 6
    for k, level in enumerate(levels):
        if level:
            assert scheduler.kernel(k) == flow("dance_grpo", noise_level=level).kernel(k)
    with pytest.raises(ValueError, match="noise_level has 4 values, one a solver step, and none for step 4"):
        flow("dance_grpo", noise_level=levels[:4]).kernel(4)


@pytest.mark.parametrize("config", FLOW_CONFIGS)
def test_flow_schedules_are_the_stock_ones(config):
    mu = 0.8 if config.get("use_dynamic_shifting") else None
    scheduler, stock = FlowMatchSDEScheduler(**config), FlowMatchEulerDiscreteScheduler(**config)
    given = [0.9, 0.7, 0.4, 0.1]
    for kwargs in ({"num_inference_steps": 6}, {"sigmas": given}, {"timesteps": [900, 500, 100]}, {"sigmas": given, "timesteps": [890, 690, 390, 90]}):
        scheduler.set_timesteps(**kwargs, mu=mu)
        stock.set_timesteps(**kwargs, mu=mu)
        assert torch.equal(scheduler.sigmas, stock.sigmas) and torch.equal(scheduler.timesteps, stock.timesteps)
        assert len(scheduler.stochastic_steps) == len(stock.timesteps)
        assert [scheduler.step_position(t) for t in scheduler.timesteps] == list(range(len(stock.timesteps)))
    if mu is not None:
        with pytest.raises(ValueError, match="`mu`"):
            scheduler.set_timesteps(6)


@pytest.mark.parametrize("sde_type", KERNELS)
def test_inverted_time_is_the_same_kernel_for_the_negated_velocity(sde_type):
    plain, inverted = flow(sde_type), flow(sde_type, invert_sigmas=True)
    torch.testing.assert_close(inverted.sigmas, 1 - plain.sigmas)
    for k in range(10):
        x, v = randn(k), randn(k + 50)
        expected = plain.transition(v, plain.timesteps[k], x)
        actual = inverted.transition(-v, inverted.timesteps[k], x)
        torch.testing.assert_close(actual.mean, expected.mean, rtol=0, atol=2e-5)
        torch.testing.assert_close(actual.std, expected.std, rtol=2e-5, atol=0)
        outs = (plain.step(v, plain.timesteps[k], x, generator=gen(k)), inverted.step(-v, inverted.timesteps[k], x, generator=gen(k)))
        torch.testing.assert_close(outs[1].prev_sample, outs[0].prev_sample, rtol=0, atol=2e-5)
        torch.testing.assert_close(outs[1].pred_original_sample, outs[0].pred_original_sample, rtol=0, atol=2e-5)


def test_flow_predicts_the_clean_sample():
    scheduler = flow()
    clean, noise = randn(0), randn(1)
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas):
        out = scheduler.step(noise - clean, t, (1 - sigma) * clean + sigma * noise)
        torch.testing.assert_close(out.pred_original_sample, clean, rtol=0, atol=1e-6)


def test_flow_has_what_other_schedulers_have():
    scheduler, x = flow(), randn(0)
    assert scheduler.init_noise_sigma == 1 and scheduler.scale_model_input(x, scheduler.timesteps[0]) is x
    timesteps = scheduler.timesteps[[2, 7]]
    sigma = scheduler.sigmas[[2, 7]].reshape(2, 1, 1, 1)
    torch.testing.assert_close(scheduler.add_noise(x, randn(1), timesteps), (1 - sigma) * x + sigma * randn(1))


def test_skipped_steps_advance_the_index():
    scheduler = flow()
    scheduler.skip_step(scheduler.timesteps[0])
    scheduler.skip_step(scheduler.timesteps[1])
    out = scheduler.step(randn(0), scheduler.timesteps[2], randn(1))
    assert out.std.item() == pytest.approx(STD["flow_grpo"][2], abs=6e-6) and scheduler.step_index == 3


# Tokens with times of their own


TOKENS = (2, 4, 3)


def held_tokens(scheduler, k, at=0.0):
    """Times (2, 4): the first token, and in the second sample another one, belong to a condition."""
    times = scheduler.timesteps[k].expand(2, 4).clone()
    times[:, 0] = times[1, 3] = at
    return times, torch.tensor([[False, True, True, True], [False, True, True, False]])


@pytest.mark.parametrize("noise_level", [0.0, 0.7])
@pytest.mark.parametrize("at", [0.0, 150.0])
def test_tokens_that_are_held_take_the_stock_step(at, noise_level):
    scheduler, stock = flow(noise_level=noise_level), FlowMatchEulerDiscreteScheduler(shift=3.0)
    stock.set_timesteps(10)
    times, drawn = held_tokens(stock, 0, at)
    args = (randn(0, TOKENS), stock.timesteps[0], randn(1, TOKENS))
    mine, theirs = (s.step(*args, generator=gen(), per_token_timesteps=times) for s in (scheduler, stock))
    same = torch.isclose(mine.prev_sample, theirs.prev_sample, rtol=0, atol=1e-6).all(-1)
    assert torch.equal(same, ~drawn if noise_level else torch.ones_like(drawn))
    assert (mine.log_prob is None) == (noise_level == 0)
    if at == 0:
        assert torch.equal(mine.prev_sample[~drawn], args[2][~drawn])


def test_only_tokens_that_are_drawn_count_in_the_log_probability():
    """As if the state had no others."""
    scheduler = flow()
    times, drawn = held_tokens(scheduler, 3)
    velocity, state = randn(0, TOKENS), randn(1, TOKENS)
    for t in scheduler.timesteps[:3]:
        scheduler.skip_step(t)
    output = scheduler.step(-velocity, scheduler.timesteps[3], state, generator=gen(), per_token_timesteps=times)
    kernel = scheduler.transition(velocity, scheduler.timesteps[3], state)
    assert torch.equal(output.std.expand(TOKENS) > 0, drawn[..., None].expand(TOKENS))
    deviation = ((output.prev_sample - kernel.mean) / kernel.std).double()
    density = -0.5 * deviation.square() - kernel.std.double().log() - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(output.log_prob, (density * drawn[..., None]).flatten(1).sum(1), rtol=1e-5, atol=1e-4)
    again = flow()
    for t in again.timesteps[:3]:
        again.skip_step(t)
    replayed = again.step(-velocity, again.timesteps[3], state, per_token_timesteps=times, prev_sample=output.prev_sample)
    assert torch.equal(replayed.log_prob, output.log_prob)


def test_tokens_all_at_the_steps_time_are_drawn_as_without_times():
    plain, tokens = flow(), flow()
    t, state = plain.timesteps[0], randn(1, TOKENS)
    expected = plain.step(randn(0, TOKENS), t, state, generator=gen())
    output = tokens.step(-randn(0, TOKENS), t, state, generator=gen(), per_token_timesteps=t.expand(2, 1))
    assert torch.equal(output.prev_sample, expected.prev_sample) and torch.equal(output.log_prob, expected.log_prob)


def test_a_step_that_holds_all_tokens_is_the_stock_step():
    scheduler, stock = flow(), FlowMatchEulerDiscreteScheduler(shift=3.0)
    stock.set_timesteps(10)
    args, times = (randn(0, TOKENS), stock.timesteps[0], randn(1, TOKENS)), torch.full((2, 4), 700.0)
    output = scheduler.step(*args, per_token_timesteps=times)
    assert output.log_prob is None and torch.equal(output.prev_sample, stock.step(*args, per_token_timesteps=times).prev_sample)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sde_type": "grpo"}, "Unknown sde_type 'grpo'.*flow_grpo"),
        ({"noise_level": -0.1}, "noise_level must be .*at least 0"),
        ({"noise_level": [0.5, -0.1]}, "noise_level must be .*at least 0"),
        ({"sde_type": "cps", "noise_level": 1.1}, "noise_level must be .*from 0 to 1"),
        ({"sde_window": (3, 3)}, "first < last"),
        ({"sde_window": (-1, 3)}, "sde_window must be"),
    ],
)
def test_flow_refuses_nonsense(config, message):
    with pytest.raises(ValueError, match=message):
        FlowMatchSDEScheduler(**config)


def test_noise_levels_stand_in_with_their_times():
    """Some pipelines tell the denoiser `scheduler.sigmas[i]`, not the time: those of the schedule as they are there, others between them."""
    scheduler = FlowMatchSDEScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    times, sigmas = scheduler.timesteps.clone(), scheduler.sigmas.clone()
    scheduler.stand_in(times[1].expand(3))
    assert torch.equal(scheduler.timesteps, times[1].expand(3)) and torch.equal(scheduler.sigmas[:-1], sigmas[1].expand(3)) and len(scheduler.sigmas) == 4
    scheduler.set_timesteps(4)
    scheduler.stand_in(torch.tensor([0.0, 500.0, 1000.0]))
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([0.0, 0.5, 1.0, 0.0]))
    scheduler.set_timesteps(4)
    scheduler.stand_in(torch.full((4, 2), 300.0))  # one of each sample is for pipelines that read the times
    assert torch.equal(scheduler.sigmas, sigmas)


def test_a_state_in_half_precision_goes_on_in_that_of_the_models_output():
    scheduler = FlowMatchSDEScheduler()
    scheduler.set_timesteps(3)
    state, output = torch.ones(1, 4, dtype=torch.bfloat16), torch.full((1, 4), 0.3)
    drawn = scheduler.step(output, scheduler.timesteps[0], state, generator=torch.Generator().manual_seed(0))
    assert drawn.prev_sample.dtype == torch.float32 and not torch.equal(drawn.prev_sample, drawn.prev_sample.bfloat16().float())
    stepped = scheduler.step(output.bfloat16(), scheduler.timesteps[1], torch.ones(1, 4))
    assert stepped.prev_sample.dtype == torch.float32
