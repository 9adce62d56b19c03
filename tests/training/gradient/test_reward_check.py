"""What is checked of a reward before training."""

from reward_gradients import tiny

from diffusers_align.data.prompts import Prompt
from diffusers_align.training.gradient.reward_check import count_frames


def test_frames_are_counted():
    assert count_frames(tiny("wan"), Prompt("a cat")) == 5
    assert count_frames(tiny("sd3"), Prompt("a cat")) is None
