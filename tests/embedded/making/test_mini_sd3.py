"""The parts of mini-sd3."""

import torch

from diffusers_align.embedded.making.mini_sd3 import silent_t5


def test_the_third_encoder_says_nothing():
    encoder, tokenizer = silent_t5(16)
    first, second = (tokenizer(text, return_tensors="pt").input_ids for text in ("a fox", "two lemons on a blue background"))
    assert torch.equal(first, second)
    assert not encoder(first)[0].any()
