"""Reward guidance and best-of-n as blocks: what the pipelines of these names give, in a user's own modular pipeline."""

import sys
from types import SimpleNamespace

import pytest
import torch
from diffusers import ModularPipelineBlocks
from diffusers.modular_pipelines import PipelineState
from diffusers.utils import dynamic_modules_utils
from guided import redness
from modular_pipelines import build
from PIL import Image
from wrapping import brightness, g

from diffusers_align import pipelines
from diffusers_align.pipelines import RewardGuidedPipeline
from diffusers_align.pipelines.modular_blocks import BestOfNStep, RewardGuidedStep, _decoder
from tests.families.cases import CASES

PROMPTS = ["a cat", "a large red dog"]


@pytest.fixture(autouse=True)
def cache_of_modules(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path_factory.getbasetemp() / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))


def with_blocks(pipe, *steps):
    """A pipeline of the same components whose blocks have these steps among them."""
    blocks = pipe.blocks
    for step in steps:
        blocks = step.around(blocks)
    pipeline = blocks.init_pipeline()
    pipeline.update_components(**pipe.components)
    return pipeline


def own(name="sd3"):
    """A modular pipeline, and what its blocks take."""
    pipe, call = build(name)
    pipe.vae.requires_grad_(False)  # torch's convolutions round otherwise where weights require a gradient, which guidance frees them of
    given = {k: [v] * len(PROMPTS) if k == "negative_prompt" else v for k, v in call.items() if k in pipe.blocks.input_names}
    return pipe, {"prompt": PROMPTS, "output_type": "pt", **given}


def seeds():
    return [g(1), g(2)]


@pytest.mark.parametrize("name, preset", [("sd3", "dps"), ("sd3", "mpgd"), ("flux", "dps"), ("qwen_image", "dps")])
def test_the_guided_step_samples_as_the_pipeline_of_that_name(name, preset):
    pipe, call = own(name)
    found = with_blocks(pipe, RewardGuidedStep())(reward=redness, reward_scale=3.0, preset=preset, generator=seeds(), **call)
    expected = RewardGuidedPipeline(pipe, redness)(reward_scale=3.0, preset=preset, generator=seeds(), **call)
    torch.testing.assert_close(found.get("images"), expected.images, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.get("guided_values"), expected.guided_values, rtol=1e-4, atol=1e-4)
    assert (redness(expected.images, None) > redness(pipe(generator=seeds(), **call).get("images"), None)).all()


@pytest.mark.parametrize("options", [{}, {"reward_scale": 0.0}, {"reward": redness, "reward_scale": 0.0}])
def test_where_nothing_is_asked_for_it_is_the_plain_pipeline_bit_for_bit(options):
    pipe, call = own()
    pipeline = with_blocks(pipe, RewardGuidedStep(), BestOfNStep())
    found = pipeline(generator=seeds(), **call, **options)
    assert torch.equal(found.get("images"), pipe(generator=seeds(), **call).get("images"))


@pytest.mark.parametrize("output_type", ["pt", "np", "pil"])
def test_the_best_of_each_prompts_outputs_is_kept(output_type):
    pipe, call = own()
    call = {**call, "num_images_per_prompt": 3}
    everything = pipe(generator=g(), **call).get("images")
    rewards = brightness(everything, None).reshape(2, 3)
    found = with_blocks(pipe, BestOfNStep())(reward=brightness, generator=g(), **{**call, "output_type": output_type})
    torch.testing.assert_close(found.get("rewards"), rewards, rtol=0, atol=5e-3)
    assert found.get("chosen").tolist() == rewards.argmax(1).tolist() and len(found.get("images")) == 2
    if output_type == "pt":
        assert torch.equal(found.get("images"), everything[[0, 1, 2, 3, 4, 5]].reshape(2, 3, *everything.shape[1:])[[0, 1], rewards.argmax(1)])
    if output_type == "pil":
        assert all(isinstance(image, Image.Image) for image in found.get("images"))


@pytest.mark.parametrize("form", ["pil", "np", "pt"])
def test_transparent_pictures_are_judged_as_they_are_seen(form):
    """Black beneath what nobody sees is white, and brighter than grey."""
    hidden, grey = torch.zeros(4, 8, 8), torch.cat([torch.full((3, 8, 8), 0.5), torch.ones(1, 8, 8)])
    arrays = torch.stack([grey, hidden]).movedim(1, -1).numpy()
    found = {"pt": torch.stack([grey, hidden]), "np": arrays, "pil": [Image.fromarray((array * 255).round().astype("uint8"), "RGBA") for array in arrays]}
    state = PipelineState()
    for name, value in {"prompt": "a cat", "reward": brightness, "images": found[form]}.items():
        state.set(name, value)
    BestOfNStep()(SimpleNamespace(device=torch.device("cpu")), state)
    torch.testing.assert_close(state.get("rewards"), torch.tensor([[0.5, 1.0]]), rtol=0, atol=3e-3)


def test_the_sound_of_the_best_is_kept_with_its_pictures():
    state, videos = PipelineState(), torch.rand(4, 2, 3, 8, 8)
    for name, value in {"prompt": PROMPTS, "reward": brightness, "videos": videos, "audio": torch.arange(8.0).reshape(4, 1, 2)}.items():
        state.set(name, value)
    BestOfNStep()(SimpleNamespace(device=torch.device("cpu")), state)
    rows = state.get("chosen") + torch.tensor([0, 2])
    assert torch.equal(state.get("videos"), videos[rows]) and torch.equal(state.get("audio")[:, 0, 0], 2.0 * rows)


def test_both_go_together_and_a_reward_gets_its_columns():
    pipe, call = own()

    def wanted(images, prompts, wish, **columns):
        assert [w for w in wish] == [{"a cat": 1, "a large red dog": 2}[p] for p in prompts]
        return redness(images, prompts)

    pipeline = with_blocks(pipe, RewardGuidedStep(), BestOfNStep())
    found = pipeline(reward=wanted, columns={"wish": [1, 2]}, reward_scale=3.0, num_images_per_prompt=2, generator=g(), **call)
    assert found.get("rewards").shape == (2, 2) and found.get("guided_values").shape[0] == 4 and len(found.get("images")) == 2


@pytest.mark.parametrize("name, kind", [("reward_guided_block", RewardGuidedStep), ("best_of_n_block", BestOfNStep)])
def test_diffusers_loads_the_blocks_from_their_folders(name, kind):
    with pytest.raises(ValueError, match="trust_remote_code"):
        ModularPipelineBlocks.from_pretrained(pipelines.path(name))
    block = ModularPipelineBlocks.from_pretrained(pipelines.path(name), trust_remote_code=True)
    assert type(block) is kind and "reward" in block.input_names
    pipe, call = own()
    found = with_blocks(pipe, block)(reward=redness, generator=seeds(), **call)
    assert found.get("guided_values" if kind is RewardGuidedStep else "rewards") is not None


@pytest.mark.parametrize(
    "step, options, message",
    [
        (BestOfNStep(), {"reward": redness, "output_type": "latent"}, "Latents cannot be judged"),
        (BestOfNStep(), {"columns": {"wish": [1, 2]}}, "the call has no reward"),
        (RewardGuidedStep(), {"reward_scale": 3.0}, "reward_scale=3 is the weight of a reward"),
        (RewardGuidedStep(), {"reward": redness, "reward_scale": float("nan")}, "reward_scale must be a finite number"),
    ],
)
def test_arguments_without_effect_are_refused(step, options, message):
    pipe, call = own()
    with pytest.raises(ValueError, match=message):
        with_blocks(pipe, step)(**{**call, **options})


def test_what_cannot_work_says_why():
    pipe, call = own()
    with pytest.raises(ValueError, match="steps a scheduler"):
        RewardGuidedStep().around(BestOfNStep().around(ModularPipelineBlocks.from_pretrained(pipelines.path("reward_guided_block"), trust_remote_code=True)))
    with pytest.raises(ValueError, match="wrap the pipeline, RewardGuidedPipeline"):
        with_blocks(pipe, RewardGuidedStep())(reward=redness, preset="classifier", **call)
    blocks = RewardGuidedStep().around(pipe.blocks)
    del blocks.sub_blocks["decode"]
    pipeline = blocks.init_pipeline()
    pipeline.update_components(**pipe.components)
    with pytest.raises(ValueError, match="No block decodes behind the guided one"):
        pipeline(reward=redness, **call)


def test_what_decodes_behind_a_guided_block_may_make_sounds():
    case = CASES["MiniMaxMusic3ModularPipeline"][0]
    pipe, seen = case.build(), []

    class Look(RewardGuidedStep):
        def __call__(self, components, state):
            seen.append((_decoder(components, state), state))
            return super().__call__(components, state)

    pipeline = with_blocks(pipe, Look())
    sounds = pipeline(prompt=case.prompts[0], generator=g(1), **{**case.call, "output_type": "pt"})
    decode, state = seen[0]
    with torch.no_grad():
        decoded = decode(sounds.get("latents"))
    expected = next(sounds.get(name) for name in ("audio", "audios", "waveform") if sounds.get(name) is not None)
    torch.testing.assert_close(decoded, torch.as_tensor(expected).reshape(decoded.shape))
