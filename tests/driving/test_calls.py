"""A pipeline without a scheduler of its own is told so in a sentence, wherever it is handed in."""

import copy

import pytest
from several_schedulers import NoScheduler, SchedulersOfParts
from tiny_pipelines import FAMILIES
from wrapping import brightness

from diffusers_align import Policy
from diffusers_align.pipelines import BestOfNPipeline, ParticleSteeringPipeline, RewardGuidedPipeline

WRAPPERS = (BestOfNPipeline, RewardGuidedPipeline, ParticleSteeringPipeline)


@pytest.mark.parametrize("use", [Policy, *(lambda pipe, wrapper=wrapper: wrapper(pipe, brightness)("a") for wrapper in WRAPPERS)])
def test_a_pipeline_without_a_scheduler_is_refused_in_words(use):
    parts = FAMILIES["sd15"].build()
    with pytest.raises(ValueError, match="NoScheduler has no scheduler of its own: it takes no steps"):
        use(NoScheduler(parts.unet))
    with pytest.raises(ValueError, match="its parts take their steps by prior_scheduler, decoder_scheduler one after the other"):
        use(SchedulersOfParts(parts.unet, parts.scheduler, copy.deepcopy(parts.scheduler)))
