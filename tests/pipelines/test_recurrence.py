"""Which steps can be made again."""

import diffusers
import pytest
import torch

from diffusers_align.driving.calls import calls_of
from diffusers_align.driving.replacements import reads_levels_by_number
from diffusers_align.pipelines import RewardGuidedPipeline
from diffusers_align.pipelines.guided_sampling import GuidanceError
from tests.families.cases import CASES


@pytest.mark.parametrize(
    "name, expected",
    [
        ("Cosmos2TextToImagePipeline", True),
        ("StableDiffusionLatentUpscalePipeline", True),
        ("AnyFlowPipeline", True),
        ("Cosmos3OmniModularPipeline", True),
        ("CogView4Pipeline", False),  # for a callback alone
        ("FluxPipeline", False),
        ("StableDiffusion3ModularPipeline", False),
    ],
)
def test_pipelines_that_look_up_their_noise_level_are_found(name, expected):
    pipeline = object.__new__(getattr(diffusers, name)) if "Modular" not in name else CASES[name][0].build()
    assert reads_levels_by_number(calls_of(pipeline).functions) is expected


def test_one_repeat_is_refused_where_the_pipeline_counts_its_steps():
    """It would read the level behind the last one's, and raise nothing."""
    case = CASES["Cosmos2TextToImagePipeline"][0]
    pipeline = RewardGuidedPipeline(case.build(), reward=lambda images, prompts: images.mean((1, 2, 3)))
    with pytest.raises(GuidanceError, match="Cosmos2TextToImagePipeline looks its noise level up by the number of its step"):
        pipeline([case.prompts[0]], generator=torch.Generator().manual_seed(0), preset="dps", recurrence=2, start=0.7, output_type="pt", **case.call)
