"""The inference pipelines around a modular pipeline: with the same components and seeds, what they give around the classic one.

Tolerances: blocks evaluate the two predictions of guidance one after the other, classic pipelines in one batch, which kernels round differently.
"""

import pytest
import torch
from guided import redness
from modular_pipelines import build, modular_of
from PIL import Image
from tiny_pipelines import FAMILIES
from torch import nn
from wrapping import brightness, g, stacked

from diffusers_align import Policy, lora
from diffusers_align.pipelines import (
    AdapterGuidancePipeline,
    BestOfNPipeline,
    NoiseOptimizationPipeline,
    ParticleSteeringPipeline,
    RewardGuidedPipeline,
)  # fmt: skip
from diffusers_align.pipelines.particle_steering import _seeds

PROMPTS = ["a cat", "a large red dog"]
CALLS = {
    "best_of_n": (BestOfNPipeline, brightness, {"num_candidates": 3, "rounds": 2, "search": "zero_order"}),
    "particles": (ParticleSteeringPipeline, brightness, {"num_particles": 3, "resample_every": 1, "returned": "all", "reward_scale": 100.0}),
    "guided": (RewardGuidedPipeline, redness, {"preset": "dps", "reward_scale": 3.0}),
    "guided_again": (RewardGuidedPipeline, redness, {"preset": "tfg", "reward_scale": 3.0, "micro_batch_size": 1}),
    "noise": (NoiseOptimizationPipeline, redness, {"optimizer": "sgd", "num_iterations": 2, "learning_rate": 5.0}),
}


def pair(name="sd3"):
    """The modular and the classic pipeline, each with the arguments of its calls."""
    classic = FAMILIES[name].build()
    modular, call = build(name)
    return (modular, call), (classic, {**FAMILIES[name].call, "negative_prompt": ""})


def near(one, other, tolerance=1e-4):
    assert one.shape == other.shape
    assert (one - other).abs().max() <= tolerance * other.abs().max().clamp(min=1)


@pytest.mark.parametrize("name", CALLS)
def test_samples_are_those_around_the_classic_pipeline(name):
    kind, reward, options = CALLS[name]
    modular, classic = (kind(pipe, reward)(PROMPTS, generator=[g(1), g(2)], output_type="pt", **options, **call) for pipe, call in pair())
    near(stacked(modular), stacked(classic), 1e-3)
    extra = {key for key in classic if key != "images"}
    assert extra and extra <= set(modular)
    for key in extra:
        if isinstance(classic[key], torch.Tensor) and key not in ("log_weights", "log_evidence"):
            near(modular[key].float(), classic[key].float(), 1e-3)


def own_call(pipe, **call):
    """The pipeline's own call with its guider as it stands."""
    call = {name: value for name, value in call.items() if name in pipe.blocks.input_names}
    return pipe(prompt=PROMPTS, generator=[g(1), g(2)], output_type="pt", **call).get("images"), call


@pytest.mark.parametrize(
    "kind, options",
    [
        (BestOfNPipeline, {"num_candidates": 1}),
        (NoiseOptimizationPipeline, {"num_iterations": 0}),
        (RewardGuidedPipeline, {"reward_scale": 0.0}),
    ],
)
def test_where_nothing_is_asked_for_it_is_the_modular_call_bit_for_bit(kind, options):
    pipe, call = build("sd3")
    pipe.vae.requires_grad_(False)  # torch's convolutions round otherwise where weights require a gradient, which guidance frees them of
    expected, call = own_call(pipe, **call)
    found = kind(pipe, redness)(PROMPTS, generator=[g(1), g(2)], output_type="pt", **options, **call)
    assert torch.equal(found.images, expected) and torch.equal(found[0], expected)


def test_particles_without_a_reward_scale_are_samples_of_the_sde():
    pipe, call = build("wan")
    options = {"num_particles": 2, "reward_scale": 0.0, "ess_threshold": 1.0, "returned": "all", "output_type": "pt"}
    found = ParticleSteeringPipeline(pipe, brightness)(PROMPTS, generator=g(), batch_size=3, **options, **call)
    assert len(found.videos) == 4
    policy = Policy(build("wan")[0], **call)
    rollout = policy.rollout([p for p in PROMPTS for _ in range(2)], seeds=_seeds(g(), 2, 2))
    near(stacked(found), policy.decode(rollout.final, rollout.condition))


def test_a_lora_is_mixed_as_around_the_classic_pipeline():
    (modular, call), (classic, own) = pair()
    classic.transformer.requires_grad_(False)
    torch.manual_seed(1)
    for parameter in lora.add({"transformer": classic.transformer}, rank=2):
        nn.init.normal_(parameter, std=0.3)
    modular = modular_of(classic, "StableDiffusion3")
    for scale in (0.0, 1.0, 0.5, "linear"):
        found, expected = (
            AdapterGuidancePipeline(pipe)(PROMPTS, adapter_scale=scale, generator=[g(1), g(2)], output_type="pt", **arguments)
            for pipe, arguments in ((modular, call), (classic, own))
        )
        near(found.images, expected.images, 1e-3)
        # A guider asks the denoiser twice a step, where the classic pipeline asks once with both predictions in a batch.
        assert found.denoiser_calls == 2 * expected.denoiser_calls


def test_the_output_is_the_modular_one_with_more_entries():
    pipe, call = build("sd3")
    best = BestOfNPipeline(pipe, brightness)
    found = best("a cat", num_candidates=2, generator=g(), **call)
    assert isinstance(found.images[0], Image.Image) and found.rewards.shape == (1, 2) and found["chosen"].shape == (1,)
    images, rewards, chosen = best("a cat", num_candidates=2, return_dict=False, generator=g(), **call)
    assert images[0].tobytes() == found.images[0].tobytes() and torch.equal(rewards, found.rewards) and chosen.shape == (1,)
    several = best(PROMPTS, num_candidates=2, num_images_per_prompt=2, generator=g(), **call)
    assert len(several.images) == 4 and several.rewards.shape == (4, 2)


def test_guidance_is_the_guiders_and_its_settings_go_with_the_call():
    pipe, call = build("sd3")
    best, scale = BestOfNPipeline(pipe, brightness), pipe.guider.guidance_scale
    options = {"num_candidates": 1, "output_type": "pt", **call}
    weak, strong = (best("a cat", generator=g(), **options | {"guidance_scale": value}).images for value in (1.5, 9.0))
    assert not torch.equal(weak, strong) and pipe.guider.guidance_scale == scale
    with pytest.raises(ValueError, match="Neither BestOfNPipeline nor StableDiffusion3ModularPipeline takes guidance_scal"):
        best("a cat", guidance_scal=2.0)
    with pytest.raises(ValueError, match="Neither AdapterGuidancePipeline nor StableDiffusion3ModularPipeline takes negative_promp"):
        tuned = lora.add({"transformer": pipe.transformer}, rank=2)
        assert tuned
        AdapterGuidancePipeline(pipe)("a cat", negative_promp="", generator=g())


def test_a_modular_pipeline_is_wrapped_as_it_is(capsys):
    pipe, call = build("sd3")
    wrapped = BestOfNPipeline(pipe, brightness)
    for own in (wrapped, BestOfNPipeline(wrapped), BestOfNPipeline.from_pipe(pipe)):
        assert own.pipeline is pipe and own.transformer is pipe.transformer and own.blocks.input_names == pipe.blocks.input_names
    with pytest.raises(TypeError, match="is wrapped around a StableDiffusion3ModularPipeline"):
        Policy(wrapped)
    wrapped.set_progress_bar_config(disable=True)
    wrapped("a cat", num_candidates=2, generator=g(), **call)
    assert not capsys.readouterr().err
    with pytest.raises(ValueError, match="does not start from noise alone"):
        picture = {"image": Image.new("RGB", (16, 16)), "strength": 0.5}
        wrapped("a cat", search="zero_order", rounds=2, generator=g(), **picture, **call)
