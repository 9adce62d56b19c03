"""Pipelines whose scheduler's steps are no chain of whole samples are refused at once, by all that would walk them."""

import pytest
import torch

from diffusers_align import Policy
from diffusers_align.pipelines import BestOfNPipeline, ParticleSteeringPipeline, RewardGuidedPipeline
from tests.families.cases import CASES

WAYS = {
    "StableDiffusionPanoramaPipeline": "one window of the sample after the other",
    "TextToVideoZeroPipeline": "puts a copy of its scheduler in that one's place",
    "StableDiffusionParadigmsPipeline": "steps many times at once",
}


@pytest.mark.filterwarnings("ignore:Default grid_sample")
@pytest.mark.parametrize("name", WAYS)
def test_it_is_said_once_and_early(name):
    case = CASES[name][0]
    with pytest.raises(ValueError, match=f"{name} .*{WAYS[name]}.* no one chain of states"):
        Policy(case.build())
    again = name == "TextToVideoZeroPipeline"  # several whole chains, of which the best of n keeps all
    for cls in (ParticleSteeringPipeline, RewardGuidedPipeline) if again else (BestOfNPipeline, ParticleSteeringPipeline, RewardGuidedPipeline):
        pipeline = cls(case.build(), reward=lambda images, prompts: images.flatten(1).mean(1))
        with pytest.raises(ValueError, match="several chains of states|no one chain of states|has no gradient"):
            pipeline(["a cat"], generator=[torch.Generator().manual_seed(1)], **case.call)


def test_a_copy_for_a_second_modality_is_no_such_case():
    assert Policy(CASES["LTX2Pipeline"][0].build()).calls.schedulers
