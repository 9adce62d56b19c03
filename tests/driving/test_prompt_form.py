"""Pipelines that take one string and one generator, or one picture, get them; whatever else they refuse is said as they say it."""

from unittest.mock import patch

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from PIL import Image
from tiny_pipelines import FAMILIES, SMALL, stable_diffusion

from diffusers_align import Policy
from diffusers_align.driving import prompt_form


class OneString(StableDiffusionPipeline):
    """Refuses lists, as some pipelines of one video do."""

    refusals = 0

    @torch.no_grad()
    def __call__(
        self, prompt: str, *, height=None, width=None, num_inference_steps=4, guidance_scale=3.0, generator=None, negative_prompt=None, output_type="pil"
    ):
        if not isinstance(prompt, str) or not isinstance(negative_prompt, str | None) or isinstance(generator, list):
            OneString.refusals += 1
            raise TypeError('can only concatenate str (not "list") to str')
        shared = {"height": height, "width": width, "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        return StableDiffusionPipeline.__call__.__wrapped__(
            self, ">" + prompt, negative_prompt=negative_prompt, generator=generator, output_type=output_type, **shared
        )


@pytest.fixture
def policy():
    OneString.refusals = 0
    with patch.object(prompt_form, "_SINGLE", type(prompt_form._SINGLE)()):
        yield Policy(stable_diffusion(OneString), **SMALL)


def test_one_prompt_and_its_generator_are_given_as_such(policy):
    expected = Policy(stable_diffusion(), **SMALL).rollout([">a cat"], seeds=[1], negative_prompt="grey").final
    for _ in range(2):
        assert torch.equal(policy.rollout(["a cat"], seeds=[1], per_sample={"negative_prompt": ["grey"]}).final, expected)
    assert OneString.refusals == 2  # as it is and with the negative prompt as a string; from then on never
    assert policy.prompt_features(policy.condition(["a cat"])).shape[0] == 1


def test_what_was_refused_is_known_outside_of_the_call(policy):
    other = Policy(stable_diffusion(OneString), **SMALL)
    with patch.object(prompt_form, "_declares_a_string", lambda calls: False):
        assert not prompt_form.takes_one_prompt(policy.calls)
        policy.rollout(["a cat"], seeds=[1])
        assert prompt_form.takes_one_prompt(policy.calls) and prompt_form.takes_one_prompt(other.calls)
        stock = Policy(stable_diffusion(), **SMALL)
        stock.rollout(["a cat"], seeds=[1])
        assert not prompt_form.takes_one_prompt(stock.calls)


@pytest.mark.parametrize("family", ["sd15", "sdxl", "qwen_image"])
def test_a_string_stands_for_each_samples_own(family):
    """Whether the pipeline repeats it or not; and says nothing of what it takes."""
    build, call = FAMILIES[family].build, {**FAMILIES[family].call, "num_inference_steps": 2}
    call.pop("negative_prompt", None)
    with patch.object(prompt_form, "_SINGLE", type(prompt_form._SINGLE)()):
        for prompts in (["a cat"], ["a cat", "a dog"]):
            seeds = list(range(len(prompts)))
            expected = Policy(build(), **call).rollout(prompts, seeds=seeds, negative_prompt=["grey"] * len(prompts)).final
            policy = Policy(build(), **call, negative_prompt="grey")
            assert torch.equal(policy.rollout(prompts, seeds=seeds).final, expected)
            assert not prompt_form.takes_one_prompt(policy.calls)


def test_a_list_beside_the_prompts_that_is_refused_is_not_the_prompts():
    class OneNegative(StableDiffusionPipeline):
        @torch.no_grad()
        def __call__(self, prompt, *, num_inference_steps=2, guidance_scale=3.0, generator=None, negative_prompt=None, output_type="pil"):
            if isinstance(negative_prompt, list):
                raise TypeError("no list")
            call = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, "output_type": output_type}
            return StableDiffusionPipeline.__call__.__wrapped__(self, prompt, negative_prompt=[negative_prompt] * len(prompt), generator=generator, **call)

    with patch.object(prompt_form, "_SINGLE", type(prompt_form._SINGLE)()):
        policy = Policy(stable_diffusion(OneNegative), num_inference_steps=2)
        expected = Policy(stable_diffusion(), num_inference_steps=2).rollout(["a cat"], seeds=[1], negative_prompt="grey", guidance_scale=3.0).final
        for given in ({"negative_prompt": "grey"}, {"negative_prompt": ["grey"]}):
            assert torch.equal(policy.rollout(["a cat"], seeds=[1], **given).final, expected)
        assert not prompt_form.takes_one_prompt(policy.calls)
        policy.rollout(["a cat", "a dog"], seeds=[1, 2], negative_prompt="grey")
        prompt_form._SINGLE.clear()
        policy.rollout(["a cat", "a dog"], seeds=[1, 2], negative_prompt="grey")
        with pytest.raises(TypeError, match="no list"):
            policy.rollout(["a cat", "a dog"], seeds=[1, 2], negative_prompt=["grey", "blue"])


def test_several_prompts_are_refused_in_words(policy):
    with pytest.raises(ValueError, match="OneString takes one prompt a call, got 2"):
        policy.rollout(["a cat", "a dog"], seeds=[1, 2])
    policy.rollout(["a cat"], seeds=[1])
    with pytest.raises(ValueError, match="OneString takes one prompt a call, got 2"):
        policy.rollout(["a cat", "a dog"], seeds=[1, 2])


def test_what_else_is_refused_is_said_as_the_pipeline_says_it(policy):
    with pytest.raises(ValueError, match="divisible by 8"):
        policy.rollout(["a cat"], seeds=[1], height=13)
    with pytest.raises(ValueError, match="divisible by 8"):
        Policy(stable_diffusion(), **SMALL).rollout(["a cat"], seeds=[1], height=13)


class OnePicture(StableDiffusionImg2ImgPipeline):
    """Refuses lists of pictures, as Wan's image-to-video does; of prompts it takes lists."""

    refusals = 0

    @torch.no_grad()
    def __call__(self, prompt, image, *, strength=0.8, num_inference_steps=4, guidance_scale=3.0, generator=None, output_type="pil"):
        if isinstance(image, list):
            OnePicture.refusals += 1
            raise ValueError("`image` has to be a picture but is a list.")
        assert isinstance(prompt, list)
        shared = {"strength": strength, "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        return StableDiffusionImg2ImgPipeline.__call__.__wrapped__(self, prompt, image, generator=generator, output_type=output_type, **shared)


def test_one_picture_is_given_as_such_and_several_are_refused_in_words():
    picture, OnePicture.refusals = Image.effect_noise((16, 16), 50).convert("RGB"), 0
    with patch.object(prompt_form, "_SINGLE", type(prompt_form._SINGLE)()):
        call = {"num_inference_steps": 4, "guidance_scale": 1.0, "strength": 0.8}
        policy, stock = (Policy(stable_diffusion(cls), **call) for cls in (OnePicture, StableDiffusionImg2ImgPipeline))
        expected = stock.rollout(["a cat"], seeds=[1], image=picture).final
        for _ in range(2):
            assert torch.equal(policy.rollout(["a cat"], seeds=[1], per_sample={"image": [picture]}).final, expected)
        assert OnePicture.refusals == 2  # as it is and with its prompt as a string; from then on never
        with pytest.raises(ValueError, match="refuses 2 samples with image of their own: .* is a list. If it takes one a call.*--train_batch_size 1"):
            policy.rollout(["a cat", "a dog"], seeds=[1, 2], per_sample={"image": [picture, picture]})


@pytest.mark.parametrize("when", ["drawn", "begun"])
def test_a_call_that_has_done_something_is_not_made_again(when):
    calls = []

    class Late(StableDiffusionPipeline):
        @torch.no_grad()
        def __call__(self, prompt, *, num_inference_steps=2, generator=None, output_type="pil"):
            calls.append(prompt)
            if when == "drawn":
                torch.randn(1, generator=generator)
            else:
                self.scheduler.set_timesteps(2)
                self.scheduler.step(torch.zeros(1, 4, 8, 8), self.scheduler.timesteps[0], torch.zeros(1, 4, 8, 8))
            raise TypeError("a list")

    with pytest.raises(TypeError, match="a list"):
        Policy(stable_diffusion(Late)).rollout(["a cat"], seeds=[1], deterministic=True)
    assert calls == [["a cat"]]
