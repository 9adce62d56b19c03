"""Rewards and gradients see what the model drew; the pipeline keeps its safety checker."""

import logging

import numpy as np
import pytest
import torch
from tiny_pipelines import FAMILIES
from torch import nn

from diffusers_align import Policy
from diffusers_align.driving import safety_checker
from diffusers_align.driving.safety_checker import unchecked
from diffusers_align.gradients.check import check_gradient
from diffusers_align.gradients.rollout import differentiable_rollout
from diffusers_align.pipelines.best_of_n import BestOfNPipeline
from diffusers_align.pipelines.reward_guided import RewardGuidedPipeline

FAMILY = FAMILIES["sd15"]
PROMPTS, SEEDS = ["a", "b", "c", "d"], [0, 1, 2, 3]


class Flagger(nn.Module):
    """Flags every second picture and blackens it, as the official checker does."""

    device, dtype = torch.device("cpu"), torch.float32

    def forward(self, images, clip_input):
        flags = [i % 2 == 0 for i in range(len(images))]
        for i, flag in enumerate(flags):
            if flag:
                images[i] = torch.zeros_like(images[i]) if torch.is_tensor(images) else np.zeros_like(images[i])
        return images, flags


class Extracted(dict):
    def to(self, *_):
        return self

    pixel_values = torch.zeros(4, 3, 4, 4)


def extractor(images, return_tensors):
    return Extracted()


def checked():
    pipeline = FAMILY.build()
    pipeline.safety_checker, pipeline.feature_extractor = Flagger(), extractor
    return pipeline


def blackened(images):
    return [float(image.abs().max()) == 0 for image in images]


def brightness(images, prompts, **columns):
    return images.mean((1, 2, 3))


def stock_images(pipeline):
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    return pipeline(PROMPTS, generator=generators, output_type="pt", **FAMILY.call).images


@torch.no_grad()
def test_a_policy_decodes_what_was_drawn_and_the_pipeline_keeps_its_checker(caplog):
    pipeline = checked()
    checker, listed = pipeline.safety_checker, pipeline.config.safety_checker
    with caplog.at_level(logging.WARNING):
        policy, clean = Policy(pipeline, **FAMILY.call), Policy(FAMILY.build(), **FAMILY.call)
        trajectory = policy.rollout(PROMPTS, seeds=SEEDS)
        images = policy.decode(trajectory.final, trajectory.condition)
        policy.decode(trajectory.final, trajectory.condition)
    assert torch.equal(images, clean.decode(trajectory.final, trajectory.condition)) and not any(blackened(images))
    assert sum("is left out" in record.message for record in caplog.records) == 1, "it is said once"
    assert pipeline.safety_checker is checker and pipeline.config.safety_checker == listed
    assert blackened(stock_images(pipeline)) == [True, False, True, False], "the user's own calls are checked as before"


def test_pictures_have_gradients(caplog):
    policy = Policy(checked(), **FAMILY.call)
    policy.add_lora(rank=2)
    check_gradient(policy, policy.condition(PROMPTS[:2], seeds=SEEDS[:2]), lambda images: images.mean((1, 2, 3)), grad_steps=[1])
    images = differentiable_rollout(policy, policy.condition(PROMPTS, seeds=SEEDS), grad_steps=[1]).images
    assert not any(blackened(images.detach()))
    images.mean().backward()
    assert all(parameter.grad is not None for parameter in policy.trainable_parameters())


def test_inference_scores_what_was_drawn_and_hands_out_what_passed():
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    out = BestOfNPipeline(checked(), reward=brightness)(PROMPTS, num_candidates=2, generator=generators, output_type="pt", **FAMILY.call)
    assert blackened(out.images) == [True, False, True, False] and (out.rewards > 0).all()
    out = RewardGuidedPipeline(checked(), reward=brightness)(PROMPTS, generator=generators, output_type="pt", **FAMILY.call)
    assert blackened(out.images) == [True, False, True, False] and (out.rewards > 0).all()


class Guardrail:
    """A checker that is asked by name, of a pipeline that will not run without."""

    def to(self, device):
        self.device = device

    def check_text_safety(self, text):
        return "unsafe" not in text

    def check_video_safety(self, frames):
        return frames * 0


class Demanding:
    def __init__(self):
        self.safety_checker = Guardrail()

    def __call__(self, prompt, frames):
        if self.safety_checker is None:
            raise ValueError("You have disabled the safety checker")
        self.safety_checker.to("cpu")
        if not self.safety_checker.check_text_safety(prompt):
            raise ValueError("unsafe")
        return self.safety_checker.check_video_safety(frames)


def test_a_pipeline_that_demands_a_checker_gets_one_that_lets_pass():
    pipeline, frames = Demanding(), np.ones((2, 4, 4, 3))
    checker = pipeline.safety_checker
    with unchecked(pipeline), unchecked(pipeline):
        assert (pipeline("unsafe", frames) == 1).all()
        assert not isinstance(pipeline.safety_checker, Guardrail)
    assert pipeline.safety_checker is checker and (pipeline("a cat", frames) == 0).all()
    with pytest.raises(KeyError), unchecked(pipeline):
        raise KeyError
    assert pipeline.safety_checker is checker
    with pytest.raises(ValueError, match="unsafe"):
        pipeline("unsafe", frames)


def test_a_pipeline_without_a_checker_is_left_alone(caplog):
    pipeline = FAMILY.build()
    with unchecked(pipeline), caplog.at_level(logging.WARNING):
        assert pipeline.safety_checker is None
    assert not caplog.text and safety_checker.COMPONENT in pipeline.config
