"""PickScore against transformers."""

import torch
from reward_models import PROMPTS, photo_like, reference_cosines

from diffusers_align.rewards.pick_score import PickScore


def test_pick_score_is_the_logit_over_26(clip_folder):
    images = photo_like(2, 3, 32, 32)
    cosines, scale = reference_cosines(clip_folder, images, PROMPTS)
    torch.testing.assert_close(PickScore(clip_folder)(images, PROMPTS), scale * cosines / 26, atol=1e-5, rtol=0)
    torch.testing.assert_close(PickScore(clip_folder, raw=True)(images, PROMPTS), scale * cosines, atol=1e-4, rtol=0)
