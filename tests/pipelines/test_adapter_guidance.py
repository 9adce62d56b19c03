"""The pipeline that mixes a model with and without its LoRA: its ends bit for bit, what lies between, schedules, guiders, errors."""

import functools
import sys

import pytest
import torch
from diffusers import DiffusionPipeline, guiders
from diffusers.utils import dynamic_modules_utils
from peft import LoraConfig, inject_adapter_in_model
from tiny_pipelines import FAMILIES

from diffusers_align import embedded, lora
from diffusers_align.driving.denoisers import denoisers
from diffusers_align.pipelines import AdapterGuidancePipeline, path
from diffusers_align.pipelines.adapter_guidance import schedule

torch.set_num_threads(1)
MINI = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent"}
CALLS = {"mini-sd": MINI, "mini-sd3": {**MINI, "max_sequence_length": 1}} | {
    name: {**FAMILIES[name].call, "output_type": "latent"} for name in ("sd15_img2img", "flux_true_cfg", "wan", "sdxl")
}


def g(seed=0):
    return torch.Generator().manual_seed(seed)


def tuned(pipe):
    """`pipe` with a LoRA that changes a lot."""
    for model in denoisers(pipe).values():
        model.requires_grad_(False)
    torch.manual_seed(1)
    for parameter in lora.add(denoisers(pipe), rank=2):
        parameter.data.normal_(std=0.3)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipes():
    built = {}

    def pipe(name):
        if name not in built:
            built[name] = tuned(DiffusionPipeline.from_pretrained(embedded.path(name)) if name.startswith("mini") else FAMILIES[name].build())
        return built[name], CALLS[name]

    return pipe


def spied(patch, cls, name, see):
    """Patch a method so that `see` gets its arguments before."""
    method = getattr(cls, name)

    @functools.wraps(method)
    def seen(*args, **kwargs):
        see(*args, *kwargs.values())
        return method(*args, **kwargs)

    patch.setattr(cls, name, seen)


def predictions(pipe, mixed, **arguments):
    """What the pipeline's own scheduler is given at each step."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        spied(patch, type(pipe.scheduler), "step", lambda scheduler, *args: found.append(args[0]))
        mixed("a cat", generator=g(), **arguments)
    return found


# --- the ends, and between ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
def test_the_ends_are_the_stock_pipelines(name, pipes):
    pipe, call = pipes(name)
    mixed = AdapterGuidancePipeline(pipe)
    fine = pipe("a cat", generator=g(), **call)[0]
    with lora.disabled(denoisers(pipe).values()):
        base = pipe("a cat", generator=g(), **call)[0]
    one, zero, half = (mixed("a cat", adapter_scale=w, generator=g(), **call) for w in (1.0, 0.0, 0.5))
    assert torch.equal(one[0], fine) and torch.equal(zero[0], base) and not torch.allclose(fine, base, atol=1e-3)
    assert half.denoiser_calls == 2 * one.denoiser_calls == 2 * zero.denoiser_calls > 0
    assert torch.equal(mixed("a cat", generator=g(), **call)[0], fine) and torch.equal(pipe("a cat", generator=g(), **call)[0], fine)
    assert not torch.allclose(half[0], fine, atol=1e-3) and not torch.allclose(half[0], base, atol=1e-3)


@pytest.mark.parametrize("w", [-0.5, 0.25, 1.7])
def test_predictions_lie_on_a_line(w, pipes):
    """At the first step, where all have the same state. True guidance is linear too."""
    pipe, call = pipes("flux_true_cfg")
    mixed = AdapterGuidancePipeline(pipe)
    base, fine, between = (predictions(pipe, mixed, adapter_scale=scale, **call)[0] for scale in (0, 1, w))
    torch.testing.assert_close(between, base + w * (fine - base), rtol=1e-4, atol=1e-4)


def test_a_second_denoiser_without_the_lora_is_left_alone(pipes):
    pipe = FAMILIES["sd3"].build()
    lora.add({"transformer": pipe.transformer}, 2)
    mixed = AdapterGuidancePipeline(pipe)
    with pytest.MonkeyPatch.context() as patch:
        other = FAMILIES["sd3"].build().transformer
        patch.setattr("diffusers_align.pipelines.adapter_guidance.denoisers", lambda pipe: {"transformer": pipe.transformer, "transformer_2": other})
        assert mixed("a cat", adapter_scale=0.5, generator=g(), **FAMILIES["sd3"].call).denoiser_calls == 8
    assert "forward" not in vars(other)


# --- schedules ------------------------------------------------------------------------------------------------------------


def test_schedules_by_hand():
    assert [schedule("linear")(k / 4) for k in range(4)] == [0.0, 0.25, 0.5, 0.75]
    assert [schedule("power_2")(k / 4) for k in range(4)] == [0.0, 1 / 16, 0.25, 9 / 16]
    assert [schedule("step_0.5")(k / 4) for k in range(4)] == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("name, steps", [("mini-sd", 3), ("sd15_img2img", 4), ("wan", 4)])
def test_a_schedule_is_followed_along_the_steps(name, steps, pipes):
    pipe, call = pipes(name)
    mixed, seen = AdapterGuidancePipeline(pipe), []
    mixed("a cat", adapter_scale=lambda fraction: seen.append(fraction) or 0.5, generator=g(), **call)
    calls = len(seen) // steps  # denoiser calls per step
    assert seen == [k / steps for k in range(steps) for _ in range(calls)]
    late = mixed("a cat", adapter_scale="step_0.5", generator=g(), **call)
    early = mixed("a cat", adapter_scale=lambda fraction: fraction < 0.5, generator=g(), **call)
    assert late.denoiser_calls == early.denoiser_calls == len(seen) and not torch.equal(late[0], early[0])
    a, b = (predictions(pipe, mixed, adapter_scale=w, **call) for w in ("step_0.5", 0))
    assert [torch.equal(one, two) for one, two in zip(a, b)] == [k / steps < 0.5 for k in range(steps)]


def test_looking_ahead_draws_nothing(pipes):
    pipe, call = pipes("sd15_img2img")
    mixed = AdapterGuidancePipeline(pipe)
    torch.manual_seed(5)
    constant = mixed("a cat", adapter_scale=0.5, **call)[0]
    torch.manual_seed(5)
    assert torch.equal(mixed("a cat", adapter_scale=lambda fraction: 0.5, **call)[0], constant)


# --- guiders --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("w", [0.3, 2.0])
def test_classifier_free_guidance_is_the_formula(w, pipes):
    pipe, call = pipes("mini-sd3")
    mixed = AdapterGuidancePipeline(pipe)
    torch.testing.assert_close(
        mixed("a cat", guider=guiders.ClassifierFreeGuidance(guidance_scale=w), generator=g(), **call)[0],
        mixed("a cat", adapter_scale=w, generator=g(), **call)[0],
    )


def test_a_guider_begins_and_stops(pipes):
    pipe, call = pipes("mini-sd")
    mixed, guider = AdapterGuidancePipeline(pipe), guiders.ClassifierFreeGuidance(guidance_scale=0.0, start=0.0, stop=0.4)
    guided = mixed("a cat", guider=guider, generator=g(), **call)
    expected = mixed("a cat", adapter_scale="step_0.3", generator=g(), **call)
    assert torch.equal(guided[0], expected[0]) and (guided.denoiser_calls, expected.denoiser_calls) == (4, 3) and guider._step is None


PAIRS = [
    guiders.AdaptiveProjectedGuidance(guidance_scale=2.0, adaptive_projected_guidance_momentum=-0.5),
    guiders.AutoGuidance(guidance_scale=2.0, auto_guidance_layers=[0], dropout=0.1),
    guiders.ClassifierFreeZeroStarGuidance(guidance_scale=2.0, zero_init_steps=0),
    guiders.TangentialClassifierFreeGuidance(guidance_scale=2.0),
]


@pytest.mark.parametrize("guider", PAIRS, ids=lambda guider: type(guider).__name__)
def test_guiders_on_a_pair_of_predictions(guider, pipes):
    """The first prediction is the guider's own of the two."""
    pipe, call = pipes("mini-sd3")
    call, mixed = {**call, "guidance_scale": 1.0}, AdapterGuidancePipeline(pipe)
    base, fine = (predictions(pipe, mixed, adapter_scale=w, **call)[0] for w in (0, 1))
    found = predictions(pipe, mixed, guider=guider, **call)
    own = type(guider).from_config(guider.config)
    own.set_state(step=0, num_inference_steps=3, timestep=torch.tensor(1000.0))
    torch.testing.assert_close(found[0], own.forward(fine, base).pred)
    assert all(x.isfinite().all() for x in found) and torch.equal(found[1], predictions(pipe, mixed, guider=guider, **call)[1])


def test_each_call_of_a_step_has_a_momentum_of_its_own(pipes):
    """The conditional call of the second step follows the conditional one of the first, whatever came between."""
    pipe, call = pipes("flux_true_cfg")
    guider, seen = guiders.AdaptiveProjectedGuidance(guidance_scale=2.0, adaptive_projected_guidance_momentum=-0.5), []
    with pytest.MonkeyPatch.context() as patch:
        spied(patch, guiders.AdaptiveProjectedGuidance, "forward", lambda guider, *pair: seen.append(guider))
        AdapterGuidancePipeline(pipe)("a cat", guider=guider, generator=g(), **call)
    assert seen == seen[:2] * (len(seen) // 2) and seen[0] is not seen[1]


# --- loading, leaving, errors ---------------------------------------------------------------------------------------------


def test_it_loads_by_path_and_takes_a_lora(pipes, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    source, call = pipes("mini-sd")
    lora.save(source, denoisers(source), tmp_path / "lora")
    pipe = DiffusionPipeline.from_pretrained(embedded.path("mini-sd"), custom_pipeline=path("adapter_guidance"), trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match=r"No LoRA is active in this StableDiffusionPipeline's unet: .*load_lora_weights"):
        pipe("a cat", **call)
    pipe.load_lora_weights(tmp_path / "lora")
    torch.testing.assert_close(pipe("a cat", generator=g(), **call)[0], source("a cat", generator=g(), **call)[0])
    pipe.set_adapters(pipe.get_active_adapters(), 0.5)  # the LoRA's own scale stays what it is
    half = pipe.pipeline("a cat", generator=g(), **call)[0]
    assert torch.equal(pipe("a cat", generator=g(), **call)[0], half) and not torch.equal(half, source("a cat", generator=g(), **call)[0])
    pipe.fuse_lora()
    with pytest.raises(ValueError, match="unfuse_lora"):
        pipe("a cat", **call)
    pipe.unfuse_lora()
    pipe.disable_lora()
    with pytest.raises(ValueError, match="No LoRA is active"):
        pipe("a cat", **call)


def test_an_exception_leaves_the_pipeline_as_it_was(pipes):
    pipe, call = pipes("mini-sd")
    before, flags = pipe("a cat", generator=g(), **call)[0], [p.requires_grad for p in pipe.unet.parameters()]

    def broken(fraction):
        if fraction > 0.5:
            raise RuntimeError("broken")
        return 0.5

    with pytest.raises(RuntimeError, match="broken"):
        AdapterGuidancePipeline(pipe)("a cat", adapter_scale=broken, generator=g(), **call)
    assert torch.equal(pipe("a cat", generator=g(), **call)[0], before) and "forward" not in vars(pipe.unet)
    assert [p.requires_grad for p in pipe.unet.parameters()] == flags


def test_a_lora_beyond_the_denoiser_is_refused():
    pipe = FAMILIES["sd15"].build()
    lora.add({"unet": pipe.unet}, 2)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), pipe.text_encoder)
    with pytest.raises(ValueError, match="changes text_encoder as well"):
        AdapterGuidancePipeline(pipe)("a cat", **FAMILIES["sd15"].call)


@pytest.mark.parametrize(
    "message, arguments",
    [
        ("adapter_scale or guider", {"adapter_scale": 1.0, "guider": guiders.ClassifierFreeGuidance()}),
        ("linear, power_P or step_F", {"adapter_scale": "cosine"}),
        ("linear, power_P or step_F", {"adapter_scale": "power"}),
        ("linear, power_P or step_F", {"adapter_scale": "linear_2"}),
        ("must be (a )?finite", {"adapter_scale": float("nan")}),
        ("one of diffusers.guiders", {"guider": 7.5}),
        ("SkipLayerGuidance takes", {"guider": guiders.SkipLayerGuidance(skip_layer_guidance_layers=[0])}),
    ],
)
def test_wrong_arguments_say_what_to_do(message, arguments, pipes):
    pipe, call = pipes("mini-sd")
    with pytest.raises(ValueError, match=message):
        AdapterGuidancePipeline(pipe)("a cat", **arguments, **call)


@pytest.mark.parametrize("name", ["num_inference_step", "reward", "per_sample"])
def test_arguments_that_the_stock_call_would_leave_unread_are_refused(name, pipes):
    pipe, call = pipes("mini-sd")
    with pytest.raises(ValueError, match=f"Neither AdapterGuidancePipeline nor StableDiffusionPipeline takes {name}"):
        AdapterGuidancePipeline(pipe)("a", **{name: 2}, **call)
