import copy
import inspect
import itertools
import json
import types

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusers_align import DDIMSDEScheduler, FlowMatchSDEScheduler, apply_recipe, sde_twin
from diffusers_align.files import paths
from diffusers_align.schedulers import KERNELS

torch.set_num_threads(1)
SHAPE = (2, 4, 4, 4)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
NOISE = {"flow_grpo": 0.7, "dance_grpo": 0.3, "memoryless": 1.0, "memoryless_em": 1.0, "cps": 0.8}
SIGMAS = [1, 0.96013, 0.91335, 0.85769, 0.79037, 0.70728, 0.60215, 0.46488, 0.27805, 0.00893, 0]


STD = {
    "flow_grpo": [0.70000, 0.74296, 0.53615, 0.44590, 0.39179, 0.35280, 0.31907, 0.28201, 0.22536, 0.00628],
    "dance_grpo": [0.05990, 0.06489, 0.07077, 0.07784, 0.08648, 0.09727, 0.11115, 0.12967, 0.15563, 0.02835],
    "cps": [0.91314, 0.86865, 0.81571, 0.75168, 0.67266, 0.57268, 0.44212, 0.26444, 0.00849, 0],
}
VECTOR = {  # mean, std, log-density summed over the four dimensions, at solver step 4
    "flow_grpo": ([0.851168, -1.909230, 0.554893, 0.194689], 0.391794, -0.060709),
    "dance_grpo": ([0.953228, -2.074620, 0.581716, 0.223593], 0.086476, 5.823728),
    "cps": ([0.418512, -1.208106, 0.441182, 0.072159], 0.672662, 4 * -0.817712),
}


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(seed: int, shape=SHAPE, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=gen(seed), dtype=dtype)


def flow(sde_type="flow_grpo", steps=10, noise_level=None, mu=None, **config) -> FlowMatchSDEScheduler:
    scheduler = FlowMatchSDEScheduler(**{"shift": 3.0} | config, sde_type=sde_type, noise_level=NOISE[sde_type] if noise_level is None else noise_level)
    scheduler.set_timesteps(steps, mu=mu)
    return scheduler


def ddim(steps=10, cls=DDIMSDEScheduler, **config):
    scheduler = cls(**SD | config)
    scheduler.set_timesteps(steps)
    return scheduler


def assert_same_loop(scheduler, stock, **stock_kwargs):
    """Walks both from one state, with model outputs that depend on the state, and compares every state bit by bit."""
    x = y = randn(0)
    for k, t in enumerate(stock.timesteps):
        out, stock_out = (torch.tanh(z) + 0.1 * randn(k + 1) for z in (x, y))
        x = scheduler.step(out, t, x, return_dict=False)
        y = stock.step(stock_out, t, y, return_dict=False, **stock_kwargs)
        assert len(x) == len(y), f"step {k}: {len(x)} outputs, stock {len(y)}"
        assert all(torch.equal(a, b) for a, b in zip(x, y)), f"step {k}"
        x, y = x[0], y[0]


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


def test_per_token_timesteps_are_refused_with_noise_and_stock_without():
    shape, tokens = (2, 4, 3), torch.full((2, 4), 700.0)
    with pytest.raises(ValueError, match="noise_level=0"):
        flow().step(randn(0, shape), flow().timesteps[0], randn(1, shape), per_token_timesteps=tokens)
    scheduler, stock = flow(noise_level=0.0), FlowMatchEulerDiscreteScheduler(shift=3.0)
    stock.set_timesteps(10)
    args = (randn(0, shape), stock.timesteps[0], randn(1, shape))
    assert torch.equal(scheduler.step(*args, per_token_timesteps=tokens).prev_sample, stock.step(*args, per_token_timesteps=tokens).prev_sample)


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


@pytest.mark.parametrize("scheduler", [flow(), ddim()], ids=["flow", "ddim"])
def test_unknown_timestep_is_an_error(scheduler):
    with pytest.raises(ValueError, match="scheduler.timesteps"):
        scheduler.step_position(torch.tensor(123.5))


# DDIM


def test_ddim_stds_have_the_published_values():
    scheduler = ddim(50)
    golden = {981: 0.454463, 781: 0.390750, 481: 0.287685, 181: 0.177067, 21: 0.039480, 1: 0.020648}
    for t, std in golden.items():
        assert scheduler.transition(randn(0), t, randn(1)).std.item() == pytest.approx(std, abs=1e-6)
    half = ddim(50, eta=0.5).transition(randn(0), 981, randn(1))
    assert half.std.item() == pytest.approx(golden[981] / 2, abs=1e-6)
    assert scheduler.stochastic_steps.all()
    assert ddim(50, set_alpha_to_one=True).stochastic_steps.tolist() == [True] * 49 + [False]


DDIM_CONFIGS = [
    {"prediction_type": "epsilon"},
    {"prediction_type": "v_prediction"},
    {"prediction_type": "sample"},
    {"prediction_type": "epsilon", "clip_sample": True},
    {"prediction_type": "epsilon", "thresholding": True},
    {"prediction_type": "epsilon", "set_alpha_to_one": True, "timestep_spacing": "trailing"},
    {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
]


@pytest.mark.parametrize("config", DDIM_CONFIGS)
@pytest.mark.parametrize("off", ["eta", "deterministic"])
def test_ddim_without_noise_is_the_stock_step_bit_for_bit(off, config):
    scheduler = ddim(**config, eta=0.0 if off == "eta" else 1.0)
    scheduler.deterministic = off == "deterministic"
    assert not scheduler.stochastic_steps.any()
    assert_same_loop(scheduler, ddim(cls=DDIMScheduler, **config))


@pytest.mark.parametrize("config", DDIM_CONFIGS)
@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_ddim_with_noise_is_the_stock_step_with_eta(eta, config):
    scheduler, stock = ddim(**config, eta=eta), ddim(cls=DDIMScheduler, **config)
    x = y = randn(0)
    generators = gen(7), gen(7)
    for k, t in enumerate(stock.timesteps):
        out = torch.tanh(x) + 0.1 * randn(k + 1)
        # The pipelines' own eta, 0.0, is ignored.
        mine = scheduler.step(out, t, x, eta=0.0, generator=generators[0])
        theirs = stock.step(out, t, y, eta=eta, generator=generators[1])
        if config.get("rescale_betas_zero_snr") and k == 0:
            # 1 - alpha' - s^2 is 0 there but for rounding, of either sign: the stock square root may be NaN or a last bit of noise.
            assert mine.prev_sample.isfinite().all()
            close = (mine.prev_sample - theirs.prev_sample).abs() < 1e-3
            assert bool((close | theirs.prev_sample.isnan()).all()), f"step {k}"
            theirs.prev_sample = mine.prev_sample
        assert torch.equal(mine.prev_sample, theirs.prev_sample), f"step {k}"
        assert torch.equal(mine.pred_original_sample, theirs.pred_original_sample), f"step {k}"
        assert (mine.log_prob is not None) == bool(scheduler.stochastic_steps[k])
        x, y = mine.prev_sample, theirs.prev_sample


@pytest.mark.parametrize("steps", [2, 3, 6, 7, 10, 16, 50])
@pytest.mark.parametrize("betas", ["scaled_linear", "linear"])
def test_ddim_is_finite_where_the_table_ends_without_signal(betas, steps):
    """There s^2 = 1 - alpha', and rounding may put it above."""
    scheduler = ddim(steps, beta_schedule=betas, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    for t in scheduler.timesteps:
        out = scheduler.step(randn(0), t, randn(1), generator=gen())
        assert out.prev_sample.isfinite().all() and out.log_prob.isfinite().all(), f"timestep {t}"


def test_ddim_transition_and_step_agree():
    scheduler = ddim(set_alpha_to_one=True, eta=0.7)
    for t in scheduler.timesteps:
        transition, out = scheduler.transition(randn(0), t, randn(1)), scheduler.step(randn(0), t, randn(1), generator=gen())
        assert torch.equal(out.std, transition.std)
        torch.testing.assert_close(out.prev_sample_mean, transition.mean, rtol=0, atol=0)


def test_ddim_accepts_given_noise():
    scheduler, stock = ddim(), ddim(cls=DDIMScheduler)
    t, noise = scheduler.timesteps[3], randn(9)
    out = scheduler.step(randn(0), t, randn(1), variance_noise=noise)
    assert torch.equal(out.prev_sample, stock.step(randn(0), t, randn(1), eta=1.0, variance_noise=noise).prev_sample)
    assert out.log_prob is not None


@pytest.mark.parametrize("eta", [-0.1, 1.1])
def test_ddim_refuses_impossible_eta(eta):
    with pytest.raises(ValueError, match="eta must be a finite number, from 0 to 1"):
        DDIMSDEScheduler(eta=eta)


def test_ddim_refuses_clipped_model_output():
    scheduler = ddim()
    with pytest.raises(ValueError, match="clip_sample=False"):
        scheduler.step(randn(0), scheduler.timesteps[0], randn(1), use_clipped_model_output=True)


# Both

BOTH = pytest.mark.parametrize("make", [flow, ddim], ids=["flow", "ddim"])


@BOTH
def test_given_action_is_returned_and_scored(make):
    scheduler, x, out, action = make(), randn(0), randn(1), randn(2)
    t = scheduler.timesteps[2]
    transition = scheduler.transition(out, t, x)
    scheduler.set_timesteps(10)
    if isinstance(scheduler, FlowMatchSDEScheduler):
        scheduler.set_begin_index(2)
    step = scheduler.step(out, t, x, prev_sample=action)
    assert step.prev_sample is action
    assert torch.equal(step.log_prob, transition.log_prob(action)) and step.log_prob.shape == (2,)
    assert torch.equal(step.prev_sample_mean, transition.mean) and torch.equal(step.std, transition.std)


@BOTH
def test_given_action_is_returned_at_deterministic_steps_too(make):
    scheduler = make()
    scheduler.deterministic = True
    action = randn(2)
    out = scheduler.step(randn(0), scheduler.timesteps[0], randn(1), prev_sample=action)
    assert out.prev_sample is action and out.log_prob is None and not torch.equal(out.prev_sample_mean, action)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_log_prob_is_that_of_the_rounded_action(make, dtype):
    scheduler, x, out = make(), randn(0, dtype=dtype), randn(1, dtype=dtype)
    t = scheduler.timesteps[0]
    step = scheduler.step(out, t, x, generator=gen(5))
    transition = scheduler.transition(out, t, x)
    assert step.prev_sample.dtype == dtype and step.pred_original_sample.dtype == dtype
    assert step.prev_sample_mean.dtype == torch.float32 and step.log_prob.dtype == torch.float64
    assert torch.equal(step.log_prob, transition.log_prob(step.prev_sample))
    unrounded = transition.sample(gen(5), dtype)
    assert torch.equal(unrounded.to(dtype), step.prev_sample)
    assert not torch.equal(step.log_prob, transition.log_prob(unrounded))


@BOTH
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("of_state, of_output", [*itertools.permutations([torch.float32, torch.bfloat16, torch.float16, torch.float64], 2)])
def test_what_a_step_returns_has_the_states_dtype_and_layout(make, deterministic, of_state, of_output):
    scheduler = make()
    scheduler.deterministic = deterministic
    state = randn(1, dtype=of_state).to(memory_format=torch.channels_last)
    out = scheduler.step(randn(0, dtype=of_output), scheduler.timesteps[0], state, generator=gen(5))
    assert out.prev_sample.dtype == out.pred_original_sample.dtype == of_state
    assert out.prev_sample.stride() == state.stride()
    assert (out.log_prob is None) == deterministic


def test_noise_without_a_density_is_refused():
    with pytest.raises(ValueError, match="no log-probability here; sde_type='cps' with noise_level=1"):
        FlowMatchSDEScheduler(stochastic_sampling=True)
    stock, kernel = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), flow("cps", noise_level=1.0, shift=1.0)
    stock.set_timesteps(10)
    drawn = (s.step(randn(0), stock.timesteps[3], randn(1), generator=gen(5)).prev_sample for s in (stock, kernel))
    torch.testing.assert_close(*drawn)
    with pytest.raises(ValueError, match="stochastic_sampling=True has no SDE twin: it draws without a density"):
        sde_twin(stock)


@BOTH
def test_draw_is_mean_plus_std_times_the_generators_noise(make):
    scheduler = make()
    out = scheduler.step(randn(0), scheduler.timesteps[0], randn(1), generator=gen(5))
    assert torch.equal(out.prev_sample, out.prev_sample_mean + out.std * randn(5))


@BOTH
def test_own_generator_is_used_where_none_is_given(make):
    first, second, third = make(), make(), make()
    t = first.timesteps[0]
    first.generator = gen(5)
    second.generator = [gen(5), gen(6)]
    third.generator = gen(99)
    drawn = first.step(randn(0), t, randn(1))
    assert torch.equal(drawn.prev_sample, third.step(randn(0), t, randn(1), generator=gen(5)).prev_sample)
    each = second.step(randn(0), t, randn(1))
    noise = torch.cat([randn(5, (1, *SHAPE[1:])), randn(6, (1, *SHAPE[1:]))])
    assert torch.equal(each.prev_sample, each.prev_sample_mean + each.std * noise)


@BOTH
def test_copies_draw_noise_of_their_own_that_the_seed_fixes(make):
    scheduler = make()
    scheduler.generator = gen(5)
    children = [copy.deepcopy(scheduler), copy.deepcopy(scheduler)]
    t = scheduler.timesteps[0]
    mine, one, two = (s.step(randn(0), t, randn(1)).prev_sample for s in (scheduler, *children))
    assert not torch.equal(mine, one) and torch.equal(one, two)
    other = make()
    other.generator = gen(6)
    assert not torch.equal(copy.deepcopy(other).step(randn(0), t, randn(1)).prev_sample, one)
    scheduler = make()
    scheduler.generator = [gen(5), gen(5)]
    child = copy.deepcopy(scheduler)
    assert isinstance(child.generator, list) and child.generator[0].initial_seed() == children[0].generator.initial_seed()


@BOTH
def test_copies_are_independent(make):
    scheduler = make()
    child = copy.deepcopy(scheduler)
    assert type(child) is type(scheduler) and child.generator is None and dict(child.config) == dict(scheduler.config)
    child.set_timesteps(3)
    child.deterministic = True
    assert len(scheduler.timesteps) == 10 and not scheduler.deterministic and scheduler.stochastic_steps.any()


@BOTH
def test_gradients_flow_through_mean_and_sample(make):
    scheduler, out = make(), randn(0).requires_grad_()
    t = scheduler.timesteps[0]
    step = scheduler.step(out, t, randn(1), prev_sample=randn(2))
    (gradient,) = torch.autograd.grad(step.log_prob.sum(), out)
    mean = scheduler.transition(out, t, randn(1)).mean
    (expected,) = torch.autograd.grad((mean * (randn(2) - step.prev_sample_mean.detach()) / step.std**2).sum(), out)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    assert gradient.abs().min() > 0
    drawn = make().step(out, t, randn(1), generator=gen()).prev_sample
    assert torch.autograd.grad(drawn.sum(), out)[0].abs().min() > 0


@pytest.mark.parametrize("cls, parent", [(FlowMatchSDEScheduler, FlowMatchEulerDiscreteScheduler), (DDIMSDEScheduler, DDIMScheduler)])
def test_signatures_are_the_parents(cls, parent):
    mine, theirs = inspect.signature(cls.step).parameters, inspect.signature(parent.step).parameters
    assert list(mine) == [*theirs, "prev_sample"]
    assert mine["prev_sample"].kind is inspect.Parameter.KEYWORD_ONLY and mine["prev_sample"].default is None
    for name, parameter in theirs.items():
        assert mine[name].default == parameter.default and mine[name].kind == parameter.kind
    assert list(inspect.signature(cls.set_timesteps).parameters) == list(inspect.signature(parent.set_timesteps).parameters)
    own = [name for name in inspect.signature(cls.__init__).parameters if name not in inspect.signature(parent.__init__).parameters]
    assert own == (["eta", "source"] if parent is DDIMScheduler else ["sde_type", "noise_level", "sde_window", "source"])
    for name, parameter in inspect.signature(parent.__init__).parameters.items():
        assert inspect.signature(cls.__init__).parameters[name].default == parameter.default
    assert issubclass(cls, parent) and cls.tuple_length == (2 if parent is DDIMScheduler else 1)


def test_pipelines_find_the_arguments_they_look_for():
    assert {"sigmas", "mu", "timesteps"} <= set(inspect.signature(FlowMatchSDEScheduler.set_timesteps).parameters)
    assert {"eta", "generator"} <= set(inspect.signature(DDIMSDEScheduler.step).parameters)


@BOTH
def test_step_returns_the_parents_tuple(make):
    for deterministic in (False, True):
        scheduler = make()
        scheduler.deterministic = deterministic
        t = scheduler.timesteps[0]
        plain = scheduler.step(randn(0), t, randn(1), return_dict=False, generator=gen())
        scheduler.set_timesteps(10)
        named = scheduler.step(randn(0), t, randn(1), generator=gen())
        assert isinstance(plain, tuple) and len(plain) == scheduler.tuple_length
        assert torch.equal(plain[0], named.prev_sample) and torch.equal(plain[0], named[0])


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchSDEScheduler(shift=3.0, sde_type="cps", noise_level=0.8, sde_window=(0, 3)),
        FlowMatchSDEScheduler(use_dynamic_shifting=True, noise_level=[0.1, 0.2] * 3),
        DDIMSDEScheduler(**SD, eta=0.3),
    ],
    ids=["window", "levels", "ddim"],
)
def test_config_survives_save_and_load(scheduler, tmp_path):
    scheduler.generator, scheduler.deterministic = gen(), True
    scheduler.save_pretrained(tmp_path)
    loaded = type(scheduler).from_pretrained(tmp_path)
    kwargs = {"mu": 0.5} if scheduler.config.get("use_dynamic_shifting") else {}
    for s in (scheduler, loaded):
        s.deterministic = False
        s.set_timesteps(6, **kwargs)
    assert torch.equal(loaded.timesteps, scheduler.timesteps) and torch.equal(loaded.stochastic_steps, scheduler.stochastic_steps)
    written = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert written["_class_name"] == type(scheduler).__name__ and not {"generator", "deterministic"} & set(written)
    mine, theirs = ({k: v for k, v in s.config.items() if not k.startswith("_")} for s in (loaded, scheduler))
    assert json.dumps(mine, sort_keys=True) == json.dumps(theirs, sort_keys=True)


def test_config_survives_the_way_there_and_back_in_memory():
    scheduler = FlowMatchSDEScheduler(shift=3.0, base_shift=0.4, sde_type="cps", noise_level=0.8)
    for cls in (FlowMatchSDEScheduler, FlowMatchEulerDiscreteScheduler):
        loaded = cls.from_config(scheduler.config)
        assert type(loaded) is cls and loaded.shift == 3.0 and loaded.config.base_shift == 0.4
    assert FlowMatchSDEScheduler.from_config(scheduler.config).config.sde_type == "cps"
    scheduler = DDIMSDEScheduler(**SD, prediction_type="v_prediction", eta=0.3)
    for cls in (DDIMSDEScheduler, DDIMScheduler, diffusers.DPMSolverMultistepScheduler):
        loaded = cls.from_config(scheduler.config)
        assert type(loaded) is cls and loaded.config.prediction_type == "v_prediction"
        assert torch.equal(loaded.alphas_cumprod, scheduler.alphas_cumprod)
    assert DDIMSDEScheduler.from_config(scheduler.config).config.eta == 0.3


# In a stock pipeline


@pytest.fixture(scope="module")
def tiny_sd():
    """A Stable Diffusion pipeline with random weights."""
    torch.manual_seed(0)
    letters = [chr(c) for c in range(97, 123)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    text = CLIPTextConfig(vocab_size=len(tokens), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                          bos_token_id=len(tokens) - 2, eos_token_id=len(tokens) - 1, pad_token_id=0)  # fmt: skip
    unet = UNet2DConditionModel(block_out_channels=(4, 8), layers_per_block=1, sample_size=16, in_channels=4, out_channels=4, norm_num_groups=2,
                                cross_attention_dim=8, attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))  # fmt: skip
    pipeline = StableDiffusionPipeline(
        unet=unet,
        vae=AutoencoderKL(block_out_channels=(4, 8), latent_channels=4, norm_num_groups=2, **blocks),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77),
        scheduler=DDIMScheduler(**SD),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def images(pipeline, scheduler, **kwargs):
    pipeline.scheduler = scheduler
    return torch.from_numpy(pipeline(["a cat", "a dog"], num_inference_steps=4, generator=gen(3), output_type="np", **kwargs).images)


def test_stock_pipeline_gives_the_same_images_with_the_stock_and_the_sde_scheduler(tiny_sd):
    ancestral, ode = (images(tiny_sd, DDIMScheduler(**SD), eta=eta) for eta in (1.0, 0.0))
    assert not torch.equal(ancestral, ode)
    # The second call passes the pipeline's default, eta=0.0.
    assert torch.equal(images(tiny_sd, DDIMSDEScheduler(**SD), eta=1.0), ancestral)
    assert torch.equal(images(tiny_sd, DDIMSDEScheduler(**SD)), ancestral)
    assert torch.equal(images(tiny_sd, DDIMSDEScheduler(**SD, eta=0.0), eta=1.0), ode)


def test_pipeline_with_an_sde_scheduler_survives_save_and_load(tiny_sd, tmp_path):
    before = images(tiny_sd, DDIMSDEScheduler(**SD, eta=0.6))
    tiny_sd.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is DDIMSDEScheduler and loaded.scheduler.config.eta == 0.6
    assert all(loaded.scheduler.config[name] == value for name, value in SD.items())
    torch.testing.assert_close(images(loaded, loaded.scheduler), before, rtol=0, atol=1e-5)  # loaded weights lie differently in memory


# Twins

SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TABLES = [
    ("DDIMScheduler", SD),
    ("DDIMScheduler", {"trained_betas": [0.01 + 0.001 * i for i in range(100)], "num_train_timesteps": 100}),
    ("DDIMScheduler", {"beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": True}),
    ("DDPMScheduler", {"beta_start": 0.0001, "beta_end": 0.02, "clip_sample": False}),
    ("DDPMScheduler", SDXL),
    ("PNDMScheduler", SDXL | {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}),
    ("EulerDiscreteScheduler", SDXL | {"timestep_spacing": "leading", "steps_offset": 1}),
    ("EulerDiscreteScheduler", SDXL | {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
    ("EulerAncestralDiscreteScheduler", SDXL),
    ("HeunDiscreteScheduler", SDXL),
    ("DPMSolverMultistepScheduler", SDXL),
    ("DPMSolverSinglestepScheduler", SDXL | {"lower_order_final": True}),
    ("UniPCMultistepScheduler", SDXL),
    ("CogVideoXDDIMScheduler", {"snr_shift_scale": 3.0}),
    ("CogVideoXDDIMScheduler", {"snr_shift_scale": 1.0, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
    ("CogVideoXDPMScheduler", {"snr_shift_scale": 1.0, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
]


@pytest.mark.parametrize(("name", "config"), TABLES)
def test_twin_of_a_diffusion_scheduler_has_its_table(name, config, tmp_path):
    source = getattr(diffusers, name)(**config)
    twin = sde_twin(source, eta=0.5)
    twin.save_pretrained(tmp_path)
    for s in (twin, DDIMSDEScheduler.from_pretrained(tmp_path), sde_twin(twin)):
        assert type(s) is DDIMSDEScheduler and s.config.eta == 0.5
        s.set_timesteps(8)
        source.set_timesteps(8)
        assert torch.equal(s.alphas_cumprod, source.alphas_cumprod.to(torch.float32))
        assert s.config.prediction_type == source.config.prediction_type
        assert s.config.num_train_timesteps == source.config.num_train_timesteps
        for t in s.timesteps:
            out = s.step(randn(0), t, randn(1), generator=gen())
            assert out.prev_sample.isfinite().all()


@pytest.mark.parametrize(("name", "config"), [row for row in TABLES if row[0] not in ("DDIMScheduler", "DDPMScheduler") or "clip_sample" in row[1]])
def test_twin_clips_only_where_its_source_does(name, config):
    assert not sde_twin(getattr(diffusers, name)(**config)).config.clip_sample


def test_twin_clips_where_its_source_does():
    twin = sde_twin(diffusers.DDPMScheduler(clip_sample=True, clip_sample_range=2.0))
    assert twin.config.clip_sample and twin.config.clip_sample_range == 2.0


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("EulerDiscreteScheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction", "use_karras_sigmas": True}),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction"}),
        ("EulerDiscreteScheduler", {"sigma_min": 0.002, "sigma_max": 80.0}),
        *((name, {entry: True}) for name in ("EulerDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
          for entry in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")),
        ("DPMSolverSinglestepScheduler", {"use_karras_sigmas": True}),
        ("DEISMultistepScheduler", {"use_karras_sigmas": True}),
        ("KDPM2DiscreteScheduler", {"use_karras_sigmas": True}),
        ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}),
        ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -5.1}),
        ("UniPCMultistepScheduler", {"sigma_max": 80.0}),
    ],
)  # fmt: skip
def test_noise_levels_off_the_table_are_refused(name, config):
    if any("beta_sigmas" in entry for entry in config):
        pytest.importorskip("scipy")
    source = getattr(diffusers, name)(**SDXL, **config)
    with pytest.raises(ValueError, match=f"{name} with ({'|'.join(config)})=.* has no SDE twin: .*from_config"):
        sde_twin(source)


@pytest.mark.parametrize("entry", ["use_karras_sigmas", "use_exponential_sigmas"])
def test_the_remedy_of_the_message_has_a_twin(entry):
    source = diffusers.EulerDiscreteScheduler(**SDXL, **{entry: True})
    assert isinstance(sde_twin(diffusers.EulerDiscreteScheduler.from_config(source.config, **{entry: False})), DDIMSDEScheduler)


@pytest.mark.parametrize(
    ("name", "spacing"),
    [(name, spacing) for name in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DDPMScheduler") for spacing in ("leading", "trailing")]
    + [("DPMSolverMultistepScheduler", "trailing"), ("UniPCMultistepScheduler", "trailing")],
)
def test_a_twin_steps_through_its_sources_timesteps(name, spacing):
    source = getattr(diffusers, name)(**SDXL, timestep_spacing=spacing, steps_offset=1)
    twin = sde_twin(source)
    for steps in (4, 10):
        source.set_timesteps(steps)
        twin.set_timesteps(steps)
        assert torch.equal(source.timesteps.float(), twin.timesteps.float())


@pytest.mark.parametrize(("final", "level"), [("zero", 1.0), ("sigma_min", None)])
def test_a_twin_ends_where_its_source_ends(final, level):
    source = diffusers.DPMSolverMultistepScheduler(**SDXL, final_sigmas_type=final, algorithm_type="dpmsolver++")
    twin = sde_twin(source)
    source.set_timesteps(8)
    expected = 1 / (1 + float(source.sigmas[-1]) ** 2)
    assert float(twin.final_alpha_cumprod) == pytest.approx(expected, rel=1e-5)
    assert level is None or float(twin.final_alpha_cumprod) == level


def test_a_table_that_ddim_knows_by_no_name_is_taken_over():
    source = diffusers.HeunDiscreteScheduler(beta_schedule="exp", num_train_timesteps=1024, prediction_type="sample")
    assert torch.equal(sde_twin(source).alphas_cumprod, source.alphas_cumprod.to(torch.float32))


def test_stochastic_sampling_and_noise_levels_above_one_are_refused():
    with pytest.raises(ValueError, match="stochastic_sampling=True has no SDE twin"):
        sde_twin(FlowMatchEulerDiscreteScheduler(stochastic_sampling=True))
    with pytest.raises(ValueError, match="Noise levels up to 80 are none of flow matching"):
        FlowMatchSDEScheduler().set_timesteps(sigmas=[80.0, 1.0, 0.1])


FLOWS = [
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, None),
    ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True, "base_shift": 0.4, "max_shift": 1.2}, 0.7),
    ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True, "shift_terminal": 0.02, "time_shift_type": "linear"}, 0.7),
    ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, None),
    ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}, None),
    ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "flow_shift": 5.0, "prediction_type": "flow_prediction"}, None),
    ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "use_dynamic_shifting": True}, 0.7),
    ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}, None),
    ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "use_dynamic_shifting": True}, 0.7),
]


@pytest.mark.parametrize(("name", "config", "mu"), FLOWS)
def test_twin_of_a_flow_scheduler_follows_its_sigmas(name, config, mu, tmp_path):
    source = getattr(diffusers, name)(**config)
    twin = sde_twin(source, sde_type="dance_grpo", noise_level=0.2)
    twin.save_pretrained(tmp_path)
    kwargs = {} if mu is None else {"mu": mu}
    for s in (twin, FlowMatchSDEScheduler.from_pretrained(tmp_path), sde_twin(twin), copy.deepcopy(twin)):
        assert type(s) is FlowMatchSDEScheduler and (s.config.sde_type, s.config.noise_level) == ("dance_grpo", 0.2)
        s.set_timesteps(8, **kwargs)
        source.set_timesteps(8, **kwargs)
        assert torch.equal(s.sigmas, source.sigmas.to(torch.float32))
        assert torch.equal(s.timesteps, source.timesteps.to(torch.float32))
        assert len(s.stochastic_steps) == 8 and s.stochastic_steps.all()
        x = randn(0)
        for t in s.timesteps:
            out = s.step(randn(1), t, x, generator=gen())
            x = out.prev_sample
            assert x.isfinite().all() and out.log_prob.isfinite().all()
        assert s.step_index == 8


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("LCMScheduler", "consistency"),
        ("TCDScheduler", "consistency"),
        ("FlowMatchLCMScheduler", "consistency"),
        ("CMStochasticIterativeScheduler", "consistency"),
        ("SCMScheduler", "consistency"),
        ("EDMEulerScheduler", "sigma space"),
        ("EDMDPMSolverMultistepScheduler", "sigma space"),
        ("KarrasVeScheduler", "variance-exploding"),
        ("ScoreSdeVeScheduler", "variance-exploding"),
        ("UnCLIPScheduler", "learned"),
        ("DDPMWuerstchenScheduler", "continuous"),
        ("RePaintScheduler", "back and forth"),
        ("IPNDMScheduler", "neither flow sigmas nor"),
        ("DDIMInverseScheduler", "noise"),
        ("DPMSolverMultistepInverseScheduler", "noise"),
        ("HeliosScheduler", "stage"),
    ],
)
def test_schedulers_without_a_gaussian_kernel_are_refused_with_the_reason(name, reason):
    cls = getattr(diffusers, name, None)
    if cls is None:
        pytest.skip(f"this diffusers has no {name}")
    with pytest.raises(ValueError, match=f"{name} has no SDE twin: .*{reason}"):
        sde_twin(cls())


def test_twin_refuses_fields_of_the_other_kind():
    with pytest.raises(ValueError, match="DDIMSDEScheduler has no noise_level, sde_type; its fields are eta"):
        sde_twin(DDIMScheduler(), sde_type="cps", noise_level=0.8)
    with pytest.raises(ValueError, match="FlowMatchSDEScheduler has no eta; its fields are sde_type, noise_level, sde_window"):
        sde_twin(FlowMatchEulerDiscreteScheduler(), eta=1.0)


def test_twin_of_a_twin_changes_only_the_given_fields():
    twin = sde_twin(FlowMatchEulerDiscreteScheduler(shift=2.5), sde_type="cps", noise_level=0.8, sde_window=(0, 4))
    again = sde_twin(twin, noise_level=0.5)
    assert (again.config.shift, again.config.sde_type, again.config.noise_level, tuple(again.config.sde_window)) == (2.5, "cps", 0.5, (0, 4))
    assert again is not twin and twin.config.noise_level == 0.8


# Recipes

RECIPES = paths.names("schedulers")
STOCK = {
    "DDIMSDEScheduler": diffusers.PNDMScheduler(beta_start=0.001, beta_end=0.013, beta_schedule="scaled_linear", set_alpha_to_one=False, steps_offset=1),
    "FlowMatchSDEScheduler": FlowMatchEulerDiscreteScheduler(shift=2.5, use_dynamic_shifting=True, base_shift=0.4, max_shift=1.4),
}


def test_recipes_of_the_documentation_are_there():
    assert {"ddpo", "flow_grpo", "flow_grpo_fast", "dance_grpo", "cps", "memoryless"} <= set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("by", ["name", "folder"])
def test_recipe_sets_its_fields_and_keeps_the_rest(recipe, by):
    folder = paths.front_door("schedulers", recipe)
    fields = json.loads((folder / "scheduler_config.json").read_text())
    stock = STOCK[fields.pop("_class_name")]
    pipeline = types.SimpleNamespace(scheduler=stock)
    assert apply_recipe(pipeline, recipe if by == "name" else folder) is pipeline
    config = pipeline.scheduler.config
    assert fields and all(config[name] == value for name, value in fields.items())
    for name in ("shift", "base_shift", "max_shift", "use_dynamic_shifting", "beta_start", "beta_end", "beta_schedule", "set_alpha_to_one", "steps_offset"):
        assert config.get(name) == stock.config.get(name)
    assert isinstance(pipeline.scheduler, (FlowMatchSDEScheduler, DDIMSDEScheduler))


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_for_the_other_kind_of_model_is_refused(recipe):
    wanted = json.loads((paths.front_door("schedulers", recipe) / "scheduler_config.json").read_text())["_class_name"]
    (other,) = set(STOCK) - {wanted}
    pipeline = types.SimpleNamespace(scheduler=STOCK[other])
    with pytest.raises(ValueError, match=f"is for {wanted}, but the pipeline's {type(STOCK[other]).__name__} becomes a {other}"):
        apply_recipe(pipeline, recipe)
    assert pipeline.scheduler is STOCK[other]


def test_unknown_recipe_names_those_there_are():
    with pytest.raises(FileNotFoundError, match="flow_grpo"):
        apply_recipe(types.SimpleNamespace(scheduler=STOCK["FlowMatchSDEScheduler"]), "no_such_recipe")


def test_recipes_hold_only_sde_fields():
    """A full scheduler config would replace the pipeline's own table."""
    for recipe in RECIPES:
        fields = json.loads((paths.front_door("schedulers", recipe) / "scheduler_config.json").read_text())
        assert set(fields) <= {"_class_name", "eta", "sde_type", "noise_level", "sde_window"}


def test_a_ddim_transition_takes_the_float_timesteps_of_a_trajectory():
    scheduler = DDIMSDEScheduler(clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(10)
    x, eps = torch.randn(2, 1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    whole, real = (scheduler.transition(eps, t, x) for t in (scheduler.timesteps[4], scheduler.timesteps[4].float()))
    assert torch.equal(whole.mean, real.mean) and torch.equal(whole.std, real.std)
