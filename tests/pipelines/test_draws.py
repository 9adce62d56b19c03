"""Second passes over what a call has drawn."""

import pytest
import torch
from wrapping import brightness, g

from diffusers_align.driving.modular import Output
from diffusers_align.pipelines import RewardGuidedPipeline
from diffusers_align.pipelines.draws import noted
from diffusers_align.pipelines.outputs import rows_of
from tests.families.cases import CASES


def test_without_a_generator_the_noted_one_draws_as_the_call_will():
    torch.manual_seed(3)
    kept = noted(None, torch.device("cpu"))
    assert torch.equal(torch.randn(5), torch.randn(5, generator=kept))
    given = [g(1), g(2)]
    assert [torch.equal(torch.randn(2, generator=a), torch.randn(2, generator=b)) for a, b in zip(noted(given, torch.device("cpu")), given)] == [True, True]


def test_an_output_of_two_has_each_sample_of_its_own():
    one, two = torch.zeros(3, 2), torch.ones(3, 2)
    tensors, nothing = rows_of((one, None), (two, None), [True, False, True])
    assert tensors[:, 0].tolist() == [0, 1, 0] and nothing is None
    arrays, texts = rows_of((one.numpy(), list("abc")), (two.numpy(), list("ABC")), [True, False, True])
    assert arrays[:, 0].tolist() == [0, 1, 0] and texts == ["a", "B", "c"]
    states = [Output(), Output()]
    for state, images, generator in zip(states, (one, two), (g(1), [g(2)] * 3)):
        state.main = "images"
        state.set("images", images)
        state.set("generator", generator)  # of a modular pipeline's state, one or several
    assert rows_of(*states, [False, True, False])["images"][:, 0].tolist() == [1, 0, 1]


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
