"""What both schedulers share: actions given and drawn, copies, generators, gradients, signatures, configurations."""

import copy
import inspect
import itertools
import json

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from schedules import SD, SHAPE, ddim, flow, gen, randn

from diffusers_align import DDIMSDEScheduler, FlowMatchSDEScheduler, SigmaSDEScheduler, sde_twin

# Flow matching: the stock step, bit for bit


@pytest.mark.parametrize("scheduler", [flow(), ddim()], ids=["flow", "ddim"])
def test_unknown_timestep_is_an_error(scheduler):
    with pytest.raises(ValueError, match="scheduler.timesteps"):
        scheduler.step_position(torch.tensor(123.5))


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
def test_what_a_step_returns_has_the_wider_dtype_and_the_states_layout(make, deterministic, of_state, of_output):
    scheduler = make()
    scheduler.deterministic = deterministic
    state = randn(1, dtype=of_state).to(memory_format=torch.channels_last)
    out = scheduler.step(randn(0, dtype=of_output), scheduler.timesteps[0], state, generator=gen(5))
    assert out.prev_sample.dtype == out.pred_original_sample.dtype == torch.promote_types(of_state, of_output)
    assert out.prev_sample.stride() == state.stride()
    assert (out.log_prob is None) == deterministic


def test_noise_without_a_density_is_refused():
    with pytest.raises(ValueError, match="no log-probability here; sde_type='cps' with noise_level=1"):
        FlowMatchSDEScheduler(stochastic_sampling=True)
    stock, kernel = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), flow("cps", noise_level=1.0, shift=1.0)
    stock.set_timesteps(10)
    torch.manual_seed(5)  # older versions of the stock scheduler draw globally
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
    assert own == (["eta", "sde_window", "source"] if parent is DDIMScheduler else ["sde_type", "noise_level", "sde_window", "source"])
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
        DDIMSDEScheduler(**SD, sde_window=(1, 4)),
        SigmaSDEScheduler(use_karras_sigmas=True, sde_window=(1, 4)),
    ],
    ids=["window", "levels", "ddim", "ddim window", "sigma window"],
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
