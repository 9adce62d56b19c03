"""The driver leaves a pipeline as it found it, and what it puts in the scheduler's place passes for the scheduler."""

import copy
import inspect

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from tiny_pipelines import FAMILIES

from diffusers_align import Policy
from diffusers_align.driving.denoisers import denoisers
from diffusers_align.driving.driver import Driver
from diffusers_align.driving.outcome import images_of, on_white
from diffusers_align.driving.prompt_memory import PromptMemory
from diffusers_align.driving.scheduler_hook import drive
from diffusers_align.driving.stock import stock_images
from diffusers_align.schedulers import sde_twin
from tests.families.cases import CASES

CALL = {"prompt": ["a cat"], "num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent", "height": 16, "width": 16}


@pytest.fixture
def pipeline():
    return FAMILIES["sd15"].build()


def call(**overrides):
    return {**CALL, "generator": torch.Generator().manual_seed(0), **overrides}


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, DPMSolverMultistepScheduler])
def test_watching_a_stock_scheduler_changes_nothing(pipeline, scheduler):
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(**call())[0]
    steps = []
    driven = drive(pipeline, lambda step: steps.append(step.k), call())[0]
    assert torch.equal(driven, expected)
    assert steps == list(range(len(pipeline.scheduler.timesteps)))


def test_inside_a_run_the_scheduler_passes_for_its_own_class(pipeline):
    cls, seen = type(pipeline.scheduler), []

    def look(step):
        seen.append(isinstance(step.scheduler, cls))
        seen.append(inspect.signature(step.scheduler.step) == inspect.signature(cls(num_train_timesteps=10).step))
        seen.append(inspect.signature(step.scheduler.set_timesteps) == inspect.signature(cls(num_train_timesteps=10).set_timesteps))
        seen.append(type(step.scheduler).__name__ == cls.__name__)

    drive(pipeline, look, call())
    assert seen and all(seen)
    assert type(pipeline.scheduler) is cls


def test_everything_is_restored_when_a_callback_raises(pipeline):
    cls, config = type(pipeline.scheduler), dict(getattr(pipeline, "_progress_bar_config", {}))

    def fail(step):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        drive(pipeline, fail, call(), needs_denoiser=lambda k: True, memory=PromptMemory())
    assert type(pipeline.scheduler) is cls
    assert "encode_prompt" not in pipeline.__dict__
    assert "forward" not in pipeline.unet.__dict__
    assert pipeline._progress_bar_config == config


def test_the_returned_state_replaces_the_schedulers(pipeline):
    out = drive(pipeline, lambda step: torch.full_like(step.sample, 0.5), call())[0]
    assert torch.equal(out, torch.full_like(out, 0.5))


def test_gated_calls_cost_nothing_and_return_zeros(pipeline):
    calls, outputs = [0], []
    pipeline.unet.register_forward_hook(lambda *_: None)
    forward = pipeline.unet.forward

    def counted(*args, **kwargs):
        calls[0] += 1
        return forward(*args, **kwargs)

    pipeline.unet.forward = counted
    drive(pipeline, lambda step: None, call(), needs_denoiser=lambda k: True)
    before = calls[0]
    drive(pipeline, lambda step: outputs.append(step.model_output), call(), needs_denoiser=lambda k: k == 1)
    assert (before, calls[0] - before) == (3, 1)
    assert [bool(output.any()) for output in outputs] == [False, True, False]
    assert pipeline.unet.forward is counted


def test_gradients_flow_only_when_asked_for(pipeline):
    pipeline.unet.requires_grad_(True)
    kept = []
    drive(pipeline, lambda step: kept.append(step.model_output.requires_grad), call())
    drive(pipeline, lambda step: kept.append(step.model_output.requires_grad), call(), gradients=True)
    assert kept == [False] * 3 + [True] * 3


def test_prompts_are_encoded_once(pipeline):
    memory, calls = PromptMemory(size=1), [0]
    pipeline.text_encoder.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    first = drive(pipeline, lambda step: None, call(), memory=memory)[0]
    encoded = calls[0]
    second = drive(pipeline, lambda step: None, call(), memory=memory)[0]
    assert encoded > 0 and calls[0] == encoded and torch.equal(first, second)
    drive(pipeline, lambda step: None, call(prompt=["a dog"]), memory=memory)
    assert calls[0] > encoded and len(memory.entries) == 1


def test_copies_of_the_scheduler_are_children_with_steps_of_their_own(pipeline):
    seen, copies = [], []

    def on_step(step):
        seen.append((step.child, step.k))
        if step.child == 0:
            if not copies:
                copies.append(copy.deepcopy(step.scheduler))
            copies[0].step(step.model_output, step.timestep, step.sample)

    drive(pipeline, on_step, call())
    assert [s for s in seen if s[0] == 0] == [(0, 0), (0, 1), (0, 2)]
    assert [s for s in seen if s[0] == 1] == [(1, 0), (1, 1), (1, 2)]


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_without_noise_of_their_own_the_steps_draw_from_the_calls_generator(family):
    """One pipeline hands its generator to the scheduler, the other does not; no draw is the global generator's."""
    pipeline = FAMILIES[family].build()
    pipeline.scheduler = sde_twin(pipeline.scheduler)
    own = {**FAMILIES[family].call, "prompt": ["a cat"], "output_type": "latent"}

    def sample(seed, **options):
        return drive(pipeline, lambda step: None, {**own, "generator": torch.Generator().manual_seed(seed)}, **options)[0]

    assert torch.equal(sample(0), sample(0)) and not torch.equal(sample(0), sample(1))
    streams = [sample(0, noise=[torch.Generator().manual_seed(seed)]) for seed in (5, 5, 6)]
    assert torch.equal(streams[0], streams[1]) and not torch.equal(streams[0], streams[2])


@pytest.mark.parametrize("solver", [DDPMScheduler, EulerAncestralDiscreteScheduler])
def test_a_stock_solver_draws_from_the_noise_that_it_is_given(pipeline, solver):
    pipeline.scheduler = solver.from_config(pipeline.scheduler.config)
    expected = pipeline(**call())[0]
    given = [drive(pipeline, lambda step: None, call(), noise=torch.Generator().manual_seed(seed))[0] for seed in (5, 5, 6)]
    assert torch.equal(drive(pipeline, lambda step: None, call())[0], expected)
    assert torch.equal(given[0], given[1]) and not torch.equal(given[0], given[2]) and not torch.equal(given[0], expected)


def test_copies_of_the_scheduler_draw_from_streams_of_their_own(pipeline):
    pipeline.scheduler = sde_twin(pipeline.scheduler)
    drawn, copies = {}, []

    def on_step(step):
        if step.child == 0 and step.k == 0:
            copies.extend(copy.deepcopy(step.scheduler) for _ in range(2))
            for child in copies:
                child.step(step.model_output, step.timestep, step.sample)
        if step.k == 0:
            drawn[step.child] = step.run().prev_sample

    drive(pipeline, on_step, call(), noise=[torch.Generator().manual_seed(5)])
    assert sorted(drawn) == [0, 1, 2]
    assert not any(torch.equal(drawn[a], drawn[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("gradients", [False, True])
def test_autocast_keeps_no_cast_weights_during_a_call(pipeline, gradients):
    """Weights that were cast without gradients must not be taken where there are some."""
    seen = []

    def look(step):
        seen.append(torch.is_autocast_cache_enabled())
        if step.k == 1:
            raise RuntimeError("stop")

    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="stop"):
        drive(pipeline, look, call(), gradients=gradients)
    assert seen == [False, False] and torch.is_autocast_cache_enabled()


def test_a_pipeline_without_denoiser_is_refused():
    class Nothing:
        components = {"tokenizer": object()}

    with pytest.raises(ValueError, match="no denoiser"):
        denoisers(Nothing())


# the driver as users of the library have it


def test_a_driver_needs_no_policy(pipeline):
    pipeline.unet.requires_grad_(True)
    stock = copy.deepcopy(pipeline)
    driver = Driver(pipeline, call_kwargs={name: CALL[name] for name in ("num_inference_steps", "guidance_scale", "height", "width")})
    condition, states = driver.condition(["a cat", "a dog"], seeds=[1, 2]), []
    assert driver.parameters.keys() == inspect.signature(type(pipeline).__call__).parameters.keys()
    outputs = []
    for on_step in (lambda step: states.append(step.run().prev_sample), lambda step: None):
        with driver.noise(condition, deterministic=False), torch.no_grad():
            outputs.append(images_of(driver.drive(condition, on_step, output_type="pt")))
    assert len(states) == 3 and outputs[0].shape == (2, 3, 16, 16) and torch.equal(*outputs)
    assert all(parameter.requires_grad for parameter in pipeline.unet.parameters()), "only a policy freezes"
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    expected = stock(["a cat", "a dog"], generator=generators, output_type="pt", **driver.call_kwargs).images
    assert torch.equal(stock_images(driver, condition), expected)


def test_noise_is_nested_and_what_was_set_is_back(pipeline):
    driver = Driver(pipeline, call_kwargs={name: CALL[name] for name in ("num_inference_steps", "guidance_scale", "height", "width")})
    condition, other = driver.condition(["a cat"], seeds=[1]), driver.condition(["a cat"], seeds=[1], step_seeds=[9])

    @torch.no_grad()
    def final():
        return driver.drive(condition, lambda step: None)[0]

    with driver.noise(condition, deterministic=False):
        first, second = final(), final()
    assert not torch.equal(first, second), "a second call draws on"
    with driver.noise(condition, deterministic=False):
        assert torch.equal(final(), first)
        with pytest.raises(RuntimeError), driver.noise(other, deterministic=False):
            assert not torch.equal(final(), first)
            raise RuntimeError
        with driver.noise(condition, deterministic=True):
            assert torch.equal(final(), final())
        assert torch.equal(final(), second)
    assert not driver.scheduler.deterministic


def test_a_call_is_the_conditions_arguments_and_what_is_overridden(pipeline):
    driver = Driver(pipeline)
    call = driver.call(driver.condition(["a cat", "a dog"], seeds=[1, 2], height=16), output_type="pt")
    assert call["prompt"] == ["a cat", "a dog"] and call["height"] == 16 and call["output_type"] == "pt"
    assert [generator.initial_seed() for generator in call["generator"]] == [1, 2]
    assert driver.call(driver.any_condition(3))["prompt"] == [""] * 3


def test_arrays_are_pictures_too():
    pictures = torch.rand(2, 3, 4, 5)
    assert torch.equal(images_of((pictures.permute(0, 2, 3, 1).numpy(),)), pictures)
    assert torch.equal(images_of((pictures[None].permute(0, 1, 3, 4, 2).numpy(),)), pictures[None])
    assert torch.equal(images_of((pictures[0].numpy(),)), pictures[0])


def test_transparent_pictures_lie_on_white():
    pictures = torch.zeros(1, 4, 1, 3)
    pictures[0, 0], pictures[0, 3] = 0.5, torch.tensor([0.0, 0.5, 1.0])
    expected = torch.tensor([[[[1.0, 0.75, 0.5]], [[1.0, 0.5, 0.0]], [[1.0, 0.5, 0.0]]]])
    assert torch.equal(on_white(pictures), expected) and torch.equal(images_of((pictures,)), expected)
    assert torch.equal(images_of((pictures.movedim(1, -1).numpy(),)), expected)
    assert torch.equal(images_of((pictures[:, :3],)), pictures[:, :3])
    latents = pictures - 0.1
    assert torch.equal(images_of((latents,)), latents)  # four channels, and no picture


@pytest.mark.parametrize("name", ["LEditsPPPipelineStableDiffusion", "CycleDiffusionPipeline"])
def test_a_pipeline_that_hands_over_the_noise_of_its_steps_is_no_policy(name):
    with pytest.raises(ValueError, match="hands each step the noise that it found for a picture, so that nothing is drawn"):
        Policy(CASES[name][0].build())


def test_a_state_gets_the_precision_of_the_models_output():
    """The first state of this pipeline is in half precision, its outputs are in float32, and so are all states after it: the pipeline checks it."""
    case = CASES["ZImageImg2ImgPipeline"][0]
    policy = Policy(case.build().to(torch.bfloat16), **case.call)
    seen = []
    condition = policy.condition(list(case.prompts), seeds=[1, 2], per_sample=case.per_sample)
    with torch.no_grad(), policy.noise(condition, False):
        policy.drive(condition, lambda step: seen.append((step.sample.dtype, step.model_output.dtype)))
    assert seen[0] == (torch.bfloat16, torch.float32) and set(seen[1:]) == {(torch.float32, torch.float32)}
    trajectory = policy.rollout(condition)
    log_probs = [kernel.log_prob(trajectory.actions[:, k]) for k, kernel in sorted(policy.transitions(trajectory).items())]
    assert torch.equal(torch.stack(log_probs, 1), trajectory.log_probs[:, trajectory.noisy_steps])


def test_a_layer_without_a_gradient_is_named_where_one_is_wanted(pipeline):
    """As FlexAttention on the CPU."""

    def forward(*args, **kwargs):
        raise NotImplementedError("FlexAttention does not support backward on CPU.")

    policy = Policy(pipeline, num_inference_steps=2, height=16, width=16)
    condition = policy.condition(["a cat"], seeds=[1])
    pipeline.unet.forward = forward
    with torch.enable_grad(), pytest.raises(ValueError, match="StableDiffusionPipeline has a layer without a gradient on this device"):
        policy.drive(condition, lambda step: None)
    with torch.no_grad(), pytest.raises(NotImplementedError):
        policy.drive(condition, lambda step: None)


def test_steps_of_other_rows_than_samples_are_refused_with_what_to_do():
    """Some pipelines hand each sample twice to the step, where they guide; some hand the frames of a video."""
    case = CASES["DiTPipeline"][0]
    policy = Policy(case.build(), **case.call)
    with pytest.raises(ValueError, match=r"made 4 samples for 2 prompts, .*guidance_scale=1"):
        policy.rollout(None, seeds=[1, 2], per_sample=case.per_sample)
    assert len(policy.rollout(None, seeds=[1, 2], per_sample=case.per_sample, guidance_scale=1.0)) == 2


LEVELS = {"timesteps": [999, 600, 300, 50], "sigmas": [14.6, 3.7, 1.3, 0.3]}


@pytest.mark.parametrize("name", LEVELS)
def test_a_schedule_of_ones_own_is_walked_as_by_the_pipelines_scheduler(name):
    """Also where a script has made the twin before, and where the pipeline has one in place already."""
    call = {**FAMILIES["sdxl"].call, name: LEVELS[name]}
    pipeline = FAMILIES["sdxl"].build()
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    expected = torch.as_tensor(pipeline(prompt=["a fox", "a cat"], generator=generators, output_type="latent", **call)[0])
    for scheduler in (None, sde_twin(pipeline.scheduler, eta=0.5, sde_window=(0, 2))):
        policy = Policy(pipeline, scheduler, **call)
        assert torch.equal(policy.rollout(["a fox", "a cat"], seeds=[3, 4], deterministic=True).final, expected)
        assert policy.rollout(["a fox"], seeds=[3]).noisy_steps == ([0, 1, 2] if scheduler is None else [0, 1])
    assert Policy(pipeline, **FAMILIES["sdxl"].call).rollout(["a fox"], seeds=[3]).num_steps == FAMILIES["sdxl"].call["num_inference_steps"]


def test_a_schedule_that_no_twin_follows_is_refused_with_what_to_do():
    pipeline = FAMILIES["sdxl"].build()
    policy = Policy(pipeline, **FAMILIES["sdxl"].call)
    with pytest.raises(ValueError, match=r"a EulerDiscreteScheduler walks .* takes no timesteps .*Policy\(pipe, timesteps=...\)"):
        policy.rollout(["a fox"], seeds=[3], timesteps=LEVELS["timesteps"])
    pipeline = FAMILIES["sdxl"].build()
    pipeline.scheduler = stock = DDPMScheduler.from_config(pipeline.scheduler.config)
    with pytest.raises(ValueError, match=r"a DDPMScheduler walks .* takes no timesteps .*EulerDiscreteScheduler.from_config"):
        Policy(pipeline, **FAMILIES["sdxl"].call, timesteps=LEVELS["timesteps"])
    assert pipeline.scheduler is stock
