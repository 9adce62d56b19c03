"""CLIP score against transformers."""

import torch
from reward_models import PROMPTS, photo_like, reference_cosines

from diffusers_align.rewards import load_reward, score
from diffusers_align.rewards.clip_score import CLIPScore


def test_clip_score_is_transformers_cosine(clip_folder):
    images, prompts = photo_like(2, 3, 32, 32), ["a cat", "two dogs and " + "many more words " * 9]
    expected, _ = reference_cosines(clip_folder, images, prompts)
    reward = load_reward("clip_score", model=clip_folder, device="cpu")
    torch.testing.assert_close(score(reward, images, prompts)["reward"], expected, atol=1e-5, rtol=0)
    assert abs(expected[0] - expected[1]) > 1e-3


def test_half_precision_images_are_scored_in_float32(clip_folder):
    images = photo_like(2, 3, 32, 32).bfloat16()
    reward = CLIPScore(clip_folder)
    torch.testing.assert_close(reward(images, PROMPTS), reward(images.float(), PROMPTS))
