"""What belongs to a call's samples was declared so, by the caller or by name: lengths say nothing."""

import inspect

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, MarigoldDepthPipeline
from PIL import Image
from tiny_pipelines import FAMILIES

from diffusers_align import Condition, Policy, Trajectory
from diffusers_align.condition import belongs_to_samples, counts_samples
from diffusers_align.gradients.rollout import differentiable_rollout
from diffusers_align.pipelines import BestOfNPipeline, ParticleSteeringPipeline, RewardGuidedPipeline
from tests.families.cases.pixels import pixel_unet

torch.set_num_threads(1)
LAYERS = {"skip_guidance_layers": [0, 1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}


def pictures(number: int, height: int = 16, width: int = 16) -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 255, (number, height, width, 3), dtype=np.uint8)
    return [Image.fromarray(own) for own in pixels]


def replay_error(policy: Policy, trajectory: Trajectory) -> float:
    """Largest difference of the replayed log-probabilities to the recorded ones, in nats."""
    errors = []
    with torch.no_grad():
        policy.replay(trajectory, lambda k, kernel: errors.append((kernel.log_prob(trajectory.actions[:, k]) - trajectory.log_probs[:, k]).abs().max()))
    return float(max(errors))


@pytest.mark.parametrize(
    "name",
    ["negative_prompt", "prompt_2", "negative_prompt_3", "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds",
     "prompt_embeds_2", "prompt_attention_mask", "negative_prompt_attention_mask", "prompt_embeds_mask", "prompt_attention_mask_2", "latents"],
)  # fmt: skip
def test_what_stock_pipelines_take_one_of_a_prompt(name):
    assert belongs_to_samples(name)


@pytest.mark.parametrize(
    "name", ["sigmas", "timesteps", "original_size", "skip_guidance_layers", "image", "ip_adapter_image", "prompt_template", "prompt_embeds_scale"]
)
def test_everything_else_is_shared(name):
    assert not belongs_to_samples(name)
    condition = Condition(["a", "b"], {name: [1, 2]})
    assert condition.select([1]).kwargs == {name: [1, 2]}


def test_a_string_stands_for_one_a_sample():
    condition = Condition(["a", "b", "c"], {"prompt_2": "y"}, per_sample={"prompt_3": "x"})
    assert condition.per_sample == {"prompt_3": ["x"] * 3} and condition.kwargs == {"prompt_2": "y"}  # which pipelines repeat themselves


@pytest.mark.parametrize("value", [["one"], torch.zeros(3, 4), torch.zeros(()), 3.0, {"a": 1, "b": 2}])
def test_another_number_than_the_samples_is_refused(value):
    with pytest.raises(ValueError, match="size belongs to the samples one by one"):
        Condition(["a", "b"], per_sample={"size": value})
    with pytest.raises(ValueError, match="prompt_embeds belongs to the samples one by one"):
        Condition(["a", "b"], {"prompt_embeds": torch.zeros(1, 3, 4)})


def test_pictures_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match=r"different sizes in one call, \(16, 16\), \(24, 16\)"):
        Condition(["a", "b"], per_sample={"image": pictures(1) + pictures(1, 16, 24)})
    with pytest.raises(ValueError, match="different sizes"):
        Condition(["a", "b"], per_sample={"image": [torch.zeros(3, 16, 16), torch.zeros(3, 16, 24)]})
    Condition(["a", "b"], {"prompt_embeds": [torch.zeros(3, 8), torch.zeros(5, 8)]})  # a length for each prompt


@pytest.mark.parametrize("seeds", [[0.0, 1.0], [-1, 2], [None, 1], ["0", "1"], [2**64, 0], 7, "12", [1]])
def test_seeds_are_whole_numbers_from_zero(seeds):
    for name in ("seeds", "step_seeds"):
        with pytest.raises(ValueError, match=f"{name}"):
            Condition(["a", "b"], **{name: seeds})


def test_seeds_of_numpy_and_torch_are_whole_numbers():
    assert Condition(["a", "b"], seeds=np.array([1, 2])).seeds == [1, 2] == Condition(["a", "b"], seeds=torch.tensor([1, 2])).seeds


def test_a_mask_is_no_selection():
    for mask in ([True, False], torch.tensor([True, False]), list(torch.tensor([True, False]))):
        with pytest.raises(TypeError, match="by their positions, not by a mask"):
            Condition(["a", "b"]).select(mask)
    assert Condition(["a", "b"]).select(torch.tensor([1, 1])).prompts == ["b", "b"]


def test_the_samples_dimension_need_not_be_the_first():
    stacked = torch.arange(24.0).reshape(3, 2, 4)  # three layers of two prompts
    condition = Condition(["a", "b"], {"prompt_embeds_llama3": stacked})
    assert torch.equal(condition.select([1]).per_sample["prompt_embeds_llama3"], stacked[:, [1]])
    assert torch.equal(Condition.cat([condition.select([0]), condition.select([1])]).per_sample["prompt_embeds_llama3"], stacked)


def test_embeddings_of_picture_prompts_are_laid_out_by_adapter():
    """Two rows per sample, unconditional and conditional: the call takes all of the one kind before the other."""
    samples = [[torch.full((2, 1, 3), 10.0 * adapter + i) + torch.tensor([0.0, 0.5])[:, None, None] for adapter in range(2)] for i in range(3)]
    call = Condition(["a", "b", "c"], per_sample={"ip_adapter_image_embeds": samples}).arguments(["ip_adapter_image_embeds"])
    assert [embeds[:, 0, 0].tolist() for embeds in call["ip_adapter_image_embeds"]] == [[0, 1, 2, 0.5, 1.5, 2.5], [10, 11, 12, 10.5, 11.5, 12.5]]


def test_joined_conditions_have_what_their_parts_have():
    one, two = Condition(["a"], {"size": [8]}, [1], None, {"image": pictures(1)}), Condition(["b"], {"size": [8]}, [2], None, {"image": pictures(1)})
    joined = Condition.cat([one, two])
    assert joined.prompts == ["a", "b"] and joined.kwargs == {"size": [8]} and joined.seeds == [1, 2] and len(joined.per_sample["image"]) == 2
    for other, message in (
        (Condition(["b"], {"size": [8], "height": 3}, [2], None, {"image": pictures(1)}), "different height"),
        (Condition(["b"], {"size": [9]}, [2], None, {"image": pictures(1)}), "different size"),
        (Condition(["b"], {"size": [8]}, [2]), "image belongs to the samples of some"),
        (Condition(["b"], {"size": [8]}, None, None, {"image": pictures(1)}), "some of them have seeds"),
        (Condition(["b"], {"size": [8]}, [2], None, {"image": torch.zeros(1, 3, 16, 16)}), "of different types"),
    ):
        with pytest.raises(ValueError, match=message):
            Condition.cat([one, other])


def test_embeddings_of_other_lengths_cannot_be_joined():
    parts = [Condition(["a"], {"prompt_embeds": torch.zeros(1, length, 4)}) for length in (3, 5)]
    with pytest.raises(ValueError, match="prompt_embeds have different shapes"):
        Condition.cat(parts)


# --- in a policy and in the pipelines ----------------------------------------------------------------------------------


def asked_layers(pipeline) -> set:
    """Which layers the denoiser was asked to skip, collected from now on."""
    seen, forward = set(), pipeline.transformer.forward

    def noting(*args, **kwargs):
        if kwargs.get("skip_layers") is not None:
            seen.add(tuple(kwargs["skip_layers"]))
        return forward(*args, **kwargs)

    pipeline.transformer.forward = noting
    return seen


def test_a_list_of_the_batchs_length_stays_whole():
    family = FAMILIES["sd3"]
    policy = Policy(family.build(), **family.call, **LAYERS)
    whole = policy.rollout(["a cat", "a dog"], seeds=[0, 1])
    part = whole.select([0])
    assert part.condition.kwargs["skip_guidance_layers"] == [0, 1]
    assert replay_error(policy, part) < 1e-3 * float(part.log_probs.nan_to_num().abs().max())


@pytest.mark.parametrize(
    "cls, options", [(ParticleSteeringPipeline, {"num_particles": 2, "batch_size": 2}), (BestOfNPipeline, {"num_candidates": 2, "batch_size": 1})]
)
def test_pipelines_pass_on_a_list_of_the_batchs_length(cls, options):
    family = FAMILIES["sd3"]
    pipeline = family.build()
    seen = asked_layers(pipeline)
    generator = [torch.Generator().manual_seed(i) for i in range(2)]
    cls(pipeline, reward=lambda images, prompts: images.mean((1, 2, 3)))(
        ["a cat", "a dog"], **options, **family.call, **LAYERS, generator=generator, output_type="pt"
    )
    assert seen == {(0, 1)}


def test_each_sample_has_its_own_picture():
    family = FAMILIES["flux_kontext"]
    call = {name: value for name, value in family.call.items() if name != "image"}
    policy, own = Policy(family.build(), **call), pictures(3)
    whole = policy.rollout(["a", "b", "c"], seeds=[0, 1, 2], per_sample={"image": own})
    alone = policy.rollout(["c"], seeds=[2], per_sample={"image": own[2:]})
    other = policy.rollout(["c"], seeds=[2], per_sample={"image": own[:1]})
    assert torch.allclose(alone.final, whole.final[2:], atol=1e-4) and not torch.allclose(other.final, alone.final, atol=1e-2)
    assert whole.select([2]).condition.per_sample["image"] == own[2:]
    assert replay_error(policy, whole) == 0 and replay_error(policy, whole.select([2])) < 1e-2


# --- arguments that would be ignored -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy(FAMILIES["sd15"].build(), **FAMILIES["sd15"].call)


@pytest.mark.parametrize(
    "name, value",
    [("prompt", "x"), ("generator", torch.Generator()), ("output_type", "pil"), ("return_dict", False), ("num_images_per_prompt", 2), ("eta", 0.5)],
)
def test_what_a_policy_sets_itself_is_refused(policy, name, value):
    with pytest.raises(ValueError, match=f"{name} cannot be an argument of a policy's call"):
        policy.condition(["a"], **{name: value})
    with pytest.raises(ValueError, match=name):
        policy.condition(["a"], per_sample={name: [value]})


def test_values_that_say_nothing_are_let_be(policy):
    policy.condition(["a"], num_images_per_prompt=1, return_dict=True, eta=None)


@pytest.mark.parametrize(
    "ignored", [{"seeds": [1]}, {"step_seeds": [1]}, {"height": 8}, {"guidance_scale": None}, {"per_sample": {}}, {"generator": torch.Generator()}]
)
def test_a_condition_has_its_own_arguments(policy, ignored):
    condition = policy.condition(["a"], seeds=[0])
    with pytest.raises(ValueError, match="leave out|leave one of them out"):
        policy.rollout(condition, **ignored)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"seeds": [1], "generator": torch.Generator()}, "leave one of them out"),
        ({"per_sample": {"height": [8]}, "height": 8}, "given for all samples and in per_sample"),
        ({"per_sample": {"heihgt": [8]}}, "has no heihgt"),
        ({"per_sample": [1]}, "per_sample is a dict"),
        ({"per_sample": {"ip_adapter_image": [1, 2]}}, "Give ip_adapter_image_embeds"),
    ],
)
def test_contradictions_are_refused(policy, arguments, message):
    with pytest.raises(ValueError, match=message):
        policy.rollout(["a"], **arguments)


@pytest.mark.parametrize("prompts, message", [([], "No prompts"), (None, "takes prompts, or prompt_embeds"), ([None], "are strings"), ([["a"]], "are strings")])
def test_prompts_are_strings(policy, prompts, message):
    with pytest.raises(ValueError, match=message):
        policy.rollout(prompts, seeds=[0])


def test_other_sizes_of_conditions_are_refused(policy):
    trajectory, other = policy.rollout(["a", "b"], seeds=[0, 1]), policy.condition(["a"], seeds=[0])
    for use in (lambda: policy.replay(trajectory, print, condition=other), lambda: policy.decode(trajectory.final, other)):
        with pytest.raises(ValueError, match="The condition is of 1 samples, the .* of 2"):
            use()


# --- embeddings in the place of prompts --------------------------------------------------------------------------------


def embedded(name: str) -> tuple[Policy, Policy, dict]:
    """A policy, one on the same pipeline without its text encoders, and what the encoders make of two prompts."""
    family = FAMILIES[name]
    whole, without = family.build(), family.build()
    if name == "sd15":
        rows = whole.encode_prompt(["a cat", "a red dog"], "cpu", 1, True)
        embeddings = dict(zip(("prompt_embeds", "negative_prompt_embeds"), rows))
    else:
        rows = whole.encode_prompt(["a cat", "a red dog"], None, None, device="cpu", max_sequence_length=family.call["max_sequence_length"])
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        embeddings = dict(zip(names, rows))
    for part in [part for part in without.components if part.startswith(("text_encoder", "tokenizer"))]:
        setattr(without, part, None)
    return Policy(whole, **family.call), Policy(without, **family.call), embeddings


@pytest.mark.parametrize("name", ["sd15", "sd3"])
@torch.no_grad()
def test_embeddings_stand_in_the_place_of_prompts_everywhere(name, tmp_path):
    whole, policy, embeddings = embedded(name)
    expected = whole.rollout(["a cat", "a red dog"], seeds=[1, 2])
    with pytest.raises(ValueError, match="has no text encoder: give a condition"):
        policy.decode(expected.final)
    trajectory = policy.rollout(None, seeds=[1, 2], **embeddings)
    assert torch.equal(trajectory.actions, expected.actions) and trajectory.condition.prompts == ["", ""]
    assert replay_error(policy, trajectory) == 0
    assert torch.allclose(policy.complete(trajectory, 1), whole.complete(expected, 1), atol=1e-5)
    latents, times = trajectory.states[:, 1], trajectory.timesteps[[1, 2]]
    for guidance in (False, True):
        own, theirs = policy.predict(latents, times, trajectory.condition, guidance), whole.predict(latents, times, expected.condition, guidance)
        assert torch.allclose(own, theirs, atol=1e-4)
    assert policy.guidance_off(trajectory.condition) == whole.guidance_off(expected.condition)
    assert torch.equal(policy.prompt_features(trajectory.condition).isfinite().all(), torch.tensor(True))
    images = policy.decode(trajectory.final)
    assert torch.equal(images, whole.decode(expected.final, expected.condition))
    assert torch.allclose(policy.encode(images), whole.encode(images), atol=1e-4)
    trajectory.save(tmp_path / "t.safetensors")
    parts = [Trajectory.load(tmp_path / "t.safetensors").select([i]) for i in range(2)]
    assert replay_error(policy, Trajectory.cat(parts)) == 0 and replay_error(policy, parts[1]) < 1e-2


def test_a_differentiable_roll_out_takes_embeddings():
    whole, policy, embeddings = embedded("sd15")
    results = [
        differentiable_rollout(own, own.condition(prompts, seeds=[1, 2], **given), grad_steps=[])
        for own, prompts, given in ((whole, ["a cat", "a red dog"], {}), (policy, None, embeddings))
    ]
    assert torch.allclose(results[0].images, results[1].images, atol=1e-5)


def test_prompts_beside_embeddings_are_what_rewards_read():
    _, policy, embeddings = embedded("sd15")
    trajectory = policy.rollout(["for the reward", "only"], seeds=[1, 2], **embeddings)
    assert trajectory.condition.prompts == ["for the reward", "only"]
    assert torch.equal(trajectory.actions, policy.rollout(None, seeds=[1, 2], **embeddings).actions)


def test_pipelines_take_embeddings():
    _, policy, embeddings = embedded("sd15")
    seen = []
    search = BestOfNPipeline(policy.pipeline, reward=lambda images, prompts: seen.extend(prompts) or images.mean((1, 2, 3)))
    output = search(num_candidates=2, **FAMILIES["sd15"].call, **embeddings, output_type="pt")
    assert set(seen) == {""} and output.rewards.shape == (2, 2)


def test_shared_pictures_as_many_as_prompts_are_said_once(caplog):
    policy, two = Policy(FAMILIES["sd15_img2img"].build()), [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    with caplog.at_level("WARNING", logger="diffusers_align.driving.driver"):
        for _ in range(2):
            policy.condition(["a", "b"], image=two)
        policy.condition(["a", "b"], per_sample={"image": two})
        policy.condition(["a", "b", "c"], image=two)
    assert [record.message for record in caplog.records if "per_sample" in record.message] == [
        "image: a list of 2 for 2 prompts is taken for all of each sample's, as pipelines with several references have it. If each belongs to one prompt, "
        'say so: per_sample={"image": [...]}.'
    ]


# --- pipelines that are told how many samples to make -----------------------------------------------------------------------


def unconditional() -> DDIMPipeline:
    pipeline = DDIMPipeline(unet=pixel_unet(), scheduler=DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_a_call_that_is_told_a_number_makes_a_sample_for_each_prompt():
    policy = Policy(unconditional(), num_inference_steps=2)
    for seeds in ([1, 2, 3], [4]):
        assert len(policy.rollout(None, seeds=seeds).final) == len(seeds)
    for cls, options in ((BestOfNPipeline, {"num_candidates": 3, "batch_size": 1}), (ParticleSteeringPipeline, {"num_particles": 2, "batch_size": 3})):
        output = cls(unconditional(), reward=lambda images, prompts: images.flatten(1).mean(1))(["", ""], num_inference_steps=2, output_type="pt", **options)
        assert output.images.shape == (2, 3, 8, 8) and bool(output.rewards.isfinite().all())


def test_another_number_is_refused():
    with pytest.raises(ValueError, match="batch_size cannot be an argument"):
        Policy(unconditional()).condition(None, seeds=[1, 2], batch_size=3)
    with pytest.raises(ValueError, match="batch_size cannot be an argument"):
        RewardGuidedPipeline(unconditional(), reward=lambda images, prompts: images.flatten(1).mean(1))([""], batch_size=3)


def test_elsewhere_it_is_another_number():
    assert not counts_samples(inspect.signature(MarigoldDepthPipeline.__call__).parameters) and counts_samples({"batch_size"})
