"""Embeddings of CLIP."""

import pytest
import torch
from reward_models import photo_like, save_clip
from safetensors.torch import load_file, save_file

from diffusers_align import embedded
from diffusers_align.rewards import load_reward
from diffusers_align.rewards.clip_embedder import CLIPEmbedder, pooled


def test_features_may_be_a_tensor_or_an_object():
    tensor = torch.rand(2, 4)
    assert pooled(tensor) is tensor and pooled(type("Output", (), {"pooler_output": tensor})()) is tensor


def test_embedder_has_unit_embeddings(clip_folder):
    clip = CLIPEmbedder(clip_folder)
    torch.testing.assert_close(clip.images(photo_like(2, 3, 32, 32)).norm(dim=-1), torch.ones(2))
    texts = clip.texts(["a cat", "two dogs with a long caption"])
    torch.testing.assert_close(texts.norm(dim=-1), torch.ones(2))
    torch.testing.assert_close(texts[:1], clip.texts(["a cat"]))  # padding plays no part


def test_a_clip_checkpoint_that_would_be_partly_random_is_refused(tmp_path):
    folder = save_clip(tmp_path)
    state = load_file(f"{folder}/model.safetensors")
    save_file({name.replace("text_model.encoder", "text_model.other"): value for name, value in state.items()}, f"{folder}/model.safetensors")
    with pytest.raises(ValueError, match="lacks .*text_model.encoder.*would be random numbers"):
        load_reward("clip_score", model=folder)


def test_a_folder_without_a_clip_model_is_told_what_to_give():
    with pytest.raises(ValueError, match="mini-sd holds no CLIP model .*give the folder or the Hub name of one, or mini-clip"):
        load_reward("clip_score", model=embedded.path("mini-sd"))
