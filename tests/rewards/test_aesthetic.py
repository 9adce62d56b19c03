"""The aesthetic predictor: the published head on CLIP's embeddings."""

import numpy as np
import pytest
import torch
from reward_models import PROMPTS, bytes_of, image_processor, photo_like
from transformers import CLIPModel

from diffusers_align.rewards import load_reward, score
from diffusers_align.rewards.aesthetic import AestheticMLP, AestheticScore
from diffusers_align.rewards.clip_embedder import pooled


def test_aesthetic_is_the_published_head_on_unit_embeddings(clip_folder, aesthetic_checkpoint):
    images = photo_like(2, 3, 32, 32)
    state = torch.load(aesthetic_checkpoint, weights_only=True)
    assert list(state) == [f"layers.{i}.{kind}" for i in (0, 2, 4, 6, 7) for kind in ("weight", "bias")]
    model = CLIPModel.from_pretrained(clip_folder)
    with torch.no_grad():
        x = pooled(model.get_image_features(pixel_values=torch.tensor(np.stack(image_processor()(bytes_of(images))["pixel_values"]))))
        x = x / x.norm(dim=-1, keepdim=True)
        for i in (0, 2, 4, 6, 7):
            x = x @ state[f"layers.{i}.weight"].T + state[f"layers.{i}.bias"]
    reward = load_reward("aesthetic", model=clip_folder, checkpoint=aesthetic_checkpoint)
    torch.testing.assert_close(score(reward, images, PROMPTS)["reward"], x[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(reward(images), reward(images))  # dropout is off


def test_aesthetic_errors_teach(clip_folder, tmp_path):
    torch.save(AestheticMLP(768).state_dict(), tmp_path / "large.pth")
    with pytest.raises(ValueError, match="made for embeddings of size 768, .* has 24"):
        AestheticScore(clip_folder, tmp_path / "large.pth")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="lacks 'layers.0.weight'"):
        AestheticScore(clip_folder, tmp_path / "other.pth")
    with pytest.raises(FileNotFoundError, match="no checkpoint .*absent.pth"):
        AestheticScore(clip_folder, tmp_path / "absent.pth")
