"""Second passes over what a call has drawn."""

import pytest
import torch
from wrapping import brightness, g

from diffusers_align.pipelines import RewardGuidedPipeline
from diffusers_align.pipelines.draws import noted
from tests.families.cases import CASES


def test_without_a_generator_the_noted_one_draws_as_the_call_will():
    torch.manual_seed(3)
    kept = noted(None, torch.device("cpu"))
    assert torch.equal(torch.randn(5), torch.randn(5, generator=kept))
    given = [g(1), g(2)]
    assert [torch.equal(torch.randn(2, generator=a), torch.randn(2, generator=b)) for a, b in zip(noted(given, torch.device("cpu")), given)] == [True, True]


@pytest.mark.parametrize("generator", [None, "one"])
def test_rewards_of_guidance_are_those_of_the_picture_that_is_returned(generator):
    """Inpainting puts back behind its last step what it has encoded with a draw."""
    case = CASES["StableDiffusion3InpaintPipeline"][0]
    torch.manual_seed(0)
    own = None if generator is None else g()
    found = RewardGuidedPipeline(case.build(), brightness)(
        ["a cat", "a dog"], preset="mpgd", generator=own, per_sample=case.per_sample, output_type="pt", **case.call
    )
    torch.testing.assert_close(found.rewards, brightness(found.images, None), rtol=0, atol=1e-5)
