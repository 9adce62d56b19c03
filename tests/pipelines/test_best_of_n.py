"""Best-of-n and search around it, on stock pipelines."""

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tiny_pipelines import FAMILIES
from wrapping import brightness, g, stacked

from diffusers_align import embedded
from diffusers_align.pipelines import BestOfNPipeline
from diffusers_align.rewards import InvalidReward
from tests.families.cases import CASES


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux", "wan", "sd15_img2img"])
def test_the_first_candidate_is_the_stock_pipelines_sample(name, pipes):
    pipe, call = pipes(name)
    for number, prompt in ((1, "a"), (2, ["a", "b"])):
        for make in (g, lambda: [g(i) for i in range(number)]):
            expected = stacked(pipe(prompt=prompt, generator=make(), output_type="pt", **call))
            one = BestOfNPipeline(pipe, brightness)(prompt, generator=make(), output_type="pt", num_candidates=1, **call)
            assert torch.equal(stacked(one), expected) and one.rewards.shape == (number, 1)
            torch.testing.assert_close(one.rewards[:, 0], brightness(expected, None))


@pytest.mark.parametrize("negative", [{}, {"negative_prompt": ["a cat", "red"]}])
def test_the_first_candidates_are_the_stock_pipelines_several_a_prompt(negative):
    pipe = DiffusionPipeline.from_pretrained(embedded.path("mini-sd3"))
    call = {"num_images_per_prompt": 2, "num_inference_steps": 2, "max_sequence_length": 1, "output_type": "pt", **negative}
    prompts = ["two dogs on a blue background", "a cat on a red background"]
    one = BestOfNPipeline(pipe, brightness)(prompts, num_candidates=1, generator=g(), **call)
    assert torch.equal(one.images, pipe(prompts, generator=g(), **call).images) and one.rewards.shape == (4, 1)


def test_another_text_encoder_makes_other_images():
    """And an empty prompt is one."""
    pipe, call = FAMILIES["sd15"].build(), {**FAMILIES["sd15"].call, "output_type": "pt"}
    best = BestOfNPipeline(pipe, brightness)
    for _ in range(2):
        for prompt in ("", "a"):
            assert torch.equal(best(prompt, num_candidates=1, generator=g(), **call).images, pipe(prompt, generator=g(), **call).images)
        with torch.no_grad():
            for parameter in pipe.text_encoder.parameters():
                parameter.mul_(0.5)


def test_the_output_is_the_stock_one(pipes):
    pipe, call = pipes("sd15")
    best = BestOfNPipeline(pipe, brightness)
    torch.manual_seed(0)
    expected = pipe(["a"], num_images_per_prompt=2, **call)
    torch.manual_seed(0)
    found = best("a", num_images_per_prompt=2, num_candidates=1, **call)
    assert type(found) is type(expected) and all(isinstance(image, Image.Image) for image in found.images)
    assert [image.tobytes() for image in found.images] == [image.tobytes() for image in expected.images]
    images, nsfw, rewards, chosen = best("a", num_candidates=2, return_dict=False, generator=g(), **call)
    assert isinstance(images[0], Image.Image) and nsfw is None and rewards.shape == (1, 2) and chosen.shape == (1,)


@pytest.mark.parametrize("name", ["sd15", "sd3"])
@pytest.mark.parametrize("search", ["random", "zero_order"])
def test_more_candidates_hold_those_of_fewer_and_the_best_comes_back(search, name, pipes):
    pipe, call = pipes(name)
    best = BestOfNPipeline(pipe, brightness)
    options = {"generator": None, "output_type": "pt", "search": search, **call}
    large = best(["a", "b"], num_candidates=3, rounds=2, **(options | {"generator": g()}))
    small = best(["a", "b"], num_candidates=3, rounds=1, **(options | {"generator": g()}))
    split = best(["a", "b"], num_candidates=3, rounds=2, batch_size=3, **(options | {"generator": g()}))
    assert large.rewards.shape == (2, 6) and len(set(large.rewards.flatten().tolist())) == 12
    torch.testing.assert_close(large.rewards[:, :3], small.rewards)
    torch.testing.assert_close(large.rewards, split.rewards)
    assert large.chosen.tolist() == large.rewards.argmax(1).tolist()
    torch.testing.assert_close(brightness(stacked(large), None), large.rewards.amax(1))


def test_neighbours_stay_near_the_best_noise(pipes):
    pipe, call = pipes("sd3")
    best, started, forward = BestOfNPipeline(pipe, brightness), [], type(pipe.transformer).forward

    def listened(self, *args, **kwargs):
        started.append(kwargs["hidden_states"].clone())
        return forward(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(pipe.transformer), "forward", listened)
        best("a", num_candidates=3, rounds=2, search="zero_order", cosine=0.9, batch_size=1, generator=g(), **call)
    found = best("a", num_candidates=3, generator=g(), **call)
    first = [x[0].flatten() for x in started[:: call["num_inference_steps"]]]  # of each call, without guidance's second row
    pivot = first[int(found.chosen)]
    near = [float(torch.cosine_similarity(pivot, x, dim=0)) for x in first[3:]]
    far = [float(torch.cosine_similarity(pivot, x, dim=0)) for x in first[:3] if x is not pivot]
    assert len(first) == 6 and min(near) > 0.8 and max(near) < 0.97 and max(map(abs, far)) < 0.5


def test_candidates_without_a_reward_are_passed_over_or_refused(pipes):
    pipe, call = pipes("sd15")

    def unsure(images, prompts, **columns):
        rewards = brightness(images, prompts)
        return torch.where(rewards == rewards.amax(), torch.nan, rewards)

    best = BestOfNPipeline(pipe, unsure)
    with pytest.raises(InvalidReward, match="unsure"):
        best("a", num_candidates=4, generator=g(), **call)
    found = best("a", num_candidates=4, on_invalid="mask", generator=g(), **call)
    assert found.rewards.isnan().any() and not found.rewards[0, found.chosen].isnan()


def test_a_choice_among_none_is_said_and_is_the_stock_sample(pipes, caplog):
    pipe, call = pipes("sd15")

    def no_dogs(images, prompts, **columns):
        return torch.tensor([float("nan") if "dog" in prompt else 1.0 for prompt in prompts])

    tensors = {**call, "output_type": "pt"}
    found = BestOfNPipeline(pipe, no_dogs)(["a cat", "a dog"], num_candidates=2, on_invalid="mask", generator=g(), **tensors)
    assert torch.equal(found.images, pipe(["a cat", "a dog"], generator=g(), **tensors).images) and found.chosen.tolist() == [0, 0]
    assert caplog.messages == ["No candidate has a reward for 1 of 2 outputs: the stock sample is returned there. Prompts: ['a dog']."]


def test_the_picture_that_was_scored_comes_back_where_the_pipeline_draws_beside_the_noise():
    """Inpainting encodes the kept region with a draw, and puts it back behind the last step: torch's global generator and a single one draw it for all
    samples together, of which one may keep its first candidate and another not."""
    case = CASES["StableDiffusion3InpaintPipeline"][0]
    call, prompts, mixed = {**case.call, "per_sample": case.per_sample, "num_candidates": 2}, ["a cat", "a dog"], 0

    def wanted(images, prompts, **columns):
        sign = torch.tensor([1.0 if prompt == "a cat" else -1.0 for prompt in prompts])
        return 100 * sign * images.flatten(1).mean(1)

    best, tensors = BestOfNPipeline(case.build(), wanted), {**call, "output_type": "pt"}
    for seed in range(3):
        torch.manual_seed(seed)
        for generator in (None, g(seed), [g(seed), g(seed + 9)]):
            found = best(prompts, generator=generator, **tensors)
            torch.testing.assert_close(wanted(found.images, prompts), found.rewards[torch.arange(2), found.chosen], rtol=0, atol=1e-3)
            mixed += isinstance(generator, torch.Generator) and found.chosen.tolist() in ([0, 1], [1, 0])
    assert mixed > 0
    listed = best(prompts, generator=g(seed), output_type="np", **call).images
    torch.testing.assert_close(torch.from_numpy(listed).movedim(-1, 1), best(prompts, generator=g(seed), **tensors).images)


def test_columns_go_to_the_reward(pipes):
    pipe, call = pipes("sd15")

    def wanted(images, prompts, wish, **columns):
        assert len(wish) == len(prompts) == len(images)
        return torch.tensor([float(w == p) for w, p in zip(wish, prompts)]) + brightness(images, prompts)

    found = BestOfNPipeline(pipe, wanted)(["a", "b"], columns={"wish": ["a", "c"]}, num_candidates=2, num_images_per_prompt=2, generator=g(), **call)
    assert (found.rewards > 1).tolist() == [[True, True]] * 2 + [[False, False]] * 2


@pytest.mark.parametrize(
    "message, arguments",
    [
        ("num_candidates must be a whole number, at least 1, got 0", {"num_candidates": 0}),
        ("batch_size must be a whole number, at least 1, or None, got -1", {"batch_size": -1}),
        ("random, zero_order", {"search": "beam"}),
        ("cosine must be a finite number, from 0 to 1, got 2.0", {"cosine": 2.0}),
        ("latents fix the initial noise", {"latents": torch.zeros(1, 4, 8, 8)}),
        ("Neither BestOfNPipeline nor StableDiffusionPipeline takes num_candidate", {"num_candidate": 3}),
        ("Give prompt", {"prompt": None}),
        ("2 outputs need as many generators, got 1", {"prompt": ["a", "b"], "generator": [g()]}),
        ("'wish' has 2 entries", {"columns": {"wish": [1, 2]}}),
        ("Give a reward", {"reward": None}),
    ],
)
def test_wrong_arguments_of_best_of_n_say_what_to_do(message, arguments, pipes):
    pipe, call = pipes("sd15")
    arguments = {"prompt": "a", "reward": brightness, **arguments}
    with pytest.raises(ValueError, match=message):
        BestOfNPipeline(pipe)(**arguments, **call)


def test_noise_has_no_neighbours_where_an_image_is_in_it(pipes):
    pipe, call = pipes("sd15_img2img")
    with pytest.raises(ValueError, match="does not start from noise alone"):
        BestOfNPipeline(pipe, brightness)("a", search="zero_order", rounds=2, **call)


def test_candidates_that_are_one_are_refused():
    """The pipeline starts from what an inversion has left, and draws nothing."""
    case = CASES["LEditsPPPipelineStableDiffusion"][0]
    pipeline = BestOfNPipeline(case.build(), reward=brightness)
    with pytest.raises(ValueError, match="makes the same samples with other seeds"):
        pipeline(["", ""], generator=[g(1), g(2)], num_candidates=2, output_type="pt", **case.call)


def test_a_pipeline_without_a_generator_is_named():
    """Of what it draws nothing could be drawn again."""

    class Unseeded(type(FAMILIES["sd15"].build())):
        def __call__(self, prompt, num_inference_steps=2):
            raise AssertionError("It is not called.")

    pipeline = BestOfNPipeline(Unseeded(**FAMILIES["sd15"].build().components), reward=brightness)
    with pytest.raises(ValueError, match="Unseeded's call takes no generator, so its samples have no seeds"):
        pipeline("a cat", generator=torch.Generator())
