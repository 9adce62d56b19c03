"""What a run says of the walk that it samples by."""

import re

import pytest
from diffusers import StableDiffusion3Img2ImgPipeline
from PIL import Image

from diffusers_align import Policy, embedded
from diffusers_align.schedulers import sde_twin
from diffusers_align.training.online.sampling import describe_window

CALL = {"num_inference_steps": 5, "guidance_scale": 1.0, "max_sequence_length": 1}


@pytest.mark.parametrize("strength, window, said", [
    (0.6, (0, 2), "solver steps 2 to 4 alone .*--sde_window 0 2 is: steps with noise: none"), (0.6, (1, 4), "steps with noise: 2, 3"), (1.0, (0, 2), None),
    (0.6, None, None),
])  # fmt: skip
def test_a_window_is_placed_in_calls_that_begin_late(strength, window, said):
    pipe = StableDiffusion3Img2ImgPipeline.from_pretrained(embedded.path("mini-sd3"))
    policy = Policy(pipe, sde_twin(pipe.scheduler, sde_window=window), **CALL, strength=strength)
    words = describe_window(policy, policy.rollout(["a cat"], seeds=[0], image=Image.new("RGB", (32, 32), "red")))
    assert len(words) == (said is not None)
    if said:
        assert re.search(said, words[0])
