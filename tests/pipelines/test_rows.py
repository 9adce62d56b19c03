"""Lists as long as the prompts are read as the stock pipeline reads them."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny_pipelines import FAMILIES, SMALL, stable_diffusion
from wrapping import brightness, g

from diffusers_align import Condition
from diffusers_align.pipelines import BestOfNPipeline, ParticleSteeringPipeline, RewardGuidedPipeline
from diffusers_align.pipelines.rows import with_own_rows
from tests.families.cases import CASES
from tests.families.parts import photograph

PICTURES = torch.cat([photograph(), photograph().flip(-1) * 0.3])
OPTIONS = {
    BestOfNPipeline: {"num_candidates": 3, "batch_size": 1},
    ParticleSteeringPipeline: {"num_particles": 2, "batch_size": 3},
    RewardGuidedPipeline: {"preset": "dps", "reward_scale": 0.0},
}


def image_to_image():
    call = {name: value for name, value in FAMILIES["sd15_img2img"].call.items() if name != "image"}
    return FAMILIES["sd15_img2img"].build(), call


@pytest.mark.parametrize("given", [list(PICTURES[:, None]), PICTURES, np.asarray(PICTURES.permute(0, 2, 3, 1))], ids=["list", "tensor", "array"])
@pytest.mark.parametrize("cls", OPTIONS)
def test_each_prompt_has_its_own_picture_where_the_pipeline_takes_one_a_prompt(cls, given):
    pipe, call = image_to_image()
    make = cls(pipe, brightness)
    options = {**OPTIONS[cls], **call, "output_type": "pt"}
    declared = make(["a", "b"], per_sample={"image": given}, generator=g(), **options)
    found = make(["a", "b"], image=given, generator=g(), **options)
    assert torch.equal(found.images, declared.images) and torch.equal(found.rewards, declared.rewards)


def test_what_is_shared_beside_them_stays_whole():
    pipe, call = image_to_image()
    make, seen = BestOfNPipeline(pipe, brightness), []
    listened = {"callback_on_step_end": lambda *a: seen.append(sorted(a[3])) or {}, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    options = {"num_candidates": 2, "batch_size": 1, "output_type": "pt", **call}
    found = make(["a", "b"], image=PICTURES, generator=g(), **listened, **options)
    assert torch.equal(found.rewards, make(["a", "b"], image=PICTURES, generator=g(), **options).rewards)
    assert {tuple(names) for names in seen} == {("latents", "prompt_embeds")}


class Refers(StableDiffusionPipeline):
    """All its pictures are of each prompt."""

    @torch.no_grad()
    def __call__(self, prompt, references, *, generator=None, output_type="pil", **call):
        assert len(references) == 2
        prompt = [f"{text} {references[1].mean():.2f}" for text in prompt]
        return StableDiffusionPipeline.__call__.__wrapped__(self, prompt, generator=generator, output_type=output_type, **SMALL)


def test_pictures_that_all_prompts_refer_to_stay_together():
    make = ParticleSteeringPipeline(stable_diffusion(Refers), brightness)
    assert make(["a", "b"], references=list(PICTURES), generator=g(), num_particles=2, batch_size=1).rewards.shape == (2, 2)


def test_nothing_is_called_where_nothing_is_as_long():
    for call in ({"image": PICTURES[:1]}, {"size": (8, 8)}, {"sigmas": torch.ones(2)}, {"text": "ab"}, {}):
        condition = Condition(["a", "b"], call)
        assert with_own_rows(None, condition) is condition
    condition = Condition(["a"], {"image": PICTURES[:1]})
    assert with_own_rows(None, condition) is condition


def test_a_second_call_reads_lists_as_the_first_one_does():
    """The denoiser alone refuses rows that do not fit, and is known by then."""
    case = CASES["KandinskyV22Pipeline"][0]
    make = BestOfNPipeline(case.build(), brightness)
    options = {"num_candidates": 2, "batch_size": 1, "output_type": "pt", **case.call, **case.per_sample}
    first, second = (make(["a", "b"], generator=g(), **options).rewards for _ in range(2))
    assert torch.equal(first, second)
