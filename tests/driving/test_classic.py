"""The calls of a classic pipeline, as the driver asks for them; what they do to a call is in test_driver and test_initial_noise."""

import inspect

import pytest
import torch
from tiny_pipelines import FAMILIES

from diffusers_align.driving.calls import calls_of
from diffusers_align.driving.classic import ClassicCalls


def test_a_classic_pipelines_calls_are_those_of_its_signature():
    pipeline = FAMILIES["sd15"].build()
    calls = calls_of(pipeline)
    assert type(calls) is ClassicCalls and calls.name == "StableDiffusionPipeline" and calls.encodes
    assert calls.parameters == dict(inspect.signature(type(pipeline).__call__).parameters)
    assert calls.schedulers == {"scheduler": pipeline.scheduler}


def test_a_picture_to_start_from_is_told_by_its_strength():
    assert calls_of(FAMILIES["sd15"].build()).starts_from_noise({})
    assert not calls_of(FAMILIES["sd15_img2img"].build()).starts_from_noise({})


def test_what_encodes_prompts_is_replaced_for_the_time_of_the_context():
    pipeline, seen = FAMILIES["sd15"].build(), []

    def encode(original, *args, **kwargs):
        seen.append(args[0])
        return original(*args, **kwargs)

    with calls_of(pipeline).encoding(encode), torch.no_grad():
        pipeline.encode_prompt(["a cat"], torch.device("cpu"), 1, False)
    assert seen == [["a cat"]] and "encode_prompt" not in vars(pipeline)


def test_a_pipeline_that_prepares_no_latents_cannot_start_from_other_noise():
    class Pipeline:
        components = {}

    with pytest.raises(ValueError, match="Pipeline draws no initial noise in prepare_latents"), calls_of(Pipeline()).initial_noise(torch.zeros_like):
        pass
    assert not calls_of(Pipeline()).schedulers and not calls_of(Pipeline()).encodes
