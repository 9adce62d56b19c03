"""What all rewards that are models promise."""

import pytest
import torch
from reward_models import PROMPTS, photo_like

from diffusers_align.rewards import score
from diffusers_align.rewards.aesthetic import AestheticScore
from diffusers_align.rewards.clip_score import CLIPScore
from diffusers_align.rewards.pick_score import PickScore
from diffusers_align.rewards.scene import SceneJudgement, SceneScore


@pytest.fixture(params=["clip_score", "pick_score", "aesthetic", "scene_score", "scene_judge"])
def model_reward(request, clip_folder, aesthetic_checkpoint):
    makers = {
        "clip_score": lambda: CLIPScore(clip_folder),
        "pick_score": lambda: PickScore(clip_folder),
        "aesthetic": lambda: AestheticScore(clip_folder, aesthetic_checkpoint),
        "scene_score": SceneScore,
        "scene_judge": SceneJudgement,
    }
    return makers[request.param]()


def test_model_rewards_have_a_gradient_and_are_frozen(model_reward):
    images = photo_like(2, 3, 48, 48).requires_grad_()
    result = score(model_reward, images, PROMPTS)["reward"]
    result.sum().backward()
    assert images.grad.isfinite().all() and all(g.norm() > 0 for g in images.grad)
    assert all(not p.requires_grad and p.dtype == torch.float32 for p in model_reward.parameters())
    assert not any(module.training for module in model_reward.modules())
    assert model_reward.to("cpu") is model_reward


def test_model_rewards_of_videos_are_means_over_frames(model_reward):
    videos = photo_like(2, 3, 3, 32, 32)
    frames = score(model_reward, videos.flatten(0, 1), [prompt for prompt in PROMPTS for _ in range(3)])["reward"]
    torch.testing.assert_close(score(model_reward, videos, PROMPTS)["reward"], frames.view(2, 3).mean(1), atol=1e-5, rtol=1e-5)


def test_a_nan_pixel_is_caught(model_reward):
    images = photo_like(2, 3, 32, 32)
    images[1, 0, 5, 5] = float("nan")
    assert score(model_reward, images, PROMPTS, on_invalid="mask")["reward"].isnan().tolist() == [False, True]
