"""Scenes drawn and encoded once."""

import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from diffusers_align import embedded
from diffusers_align.embedded.making import latents
from diffusers_align.embedded.making.latents import SHARES, LatentScenes, encode, write_safely
from diffusers_align.embedded.teaching import build_tokenizer, make_scenes, tokenize


@pytest.fixture
def out(tmp_path):
    shutil.copytree(Path(embedded.path("mini-sd3")) / "vae", tmp_path / "vae")
    return tmp_path


def test_scenes_are_drawn_in_the_shares_that_training_wants():
    _, scenes, _ = make_scenes(2000, 5, **SHARES)
    counts = Counter(scene.count for scene in scenes)
    assert [counts[n] / 2000 for n in (1, 2, 3)] == pytest.approx(SHARES["counts"], abs=0.03)
    sided = sum(scene.position is not None for scene in scenes) / counts[1]
    assert sided == pytest.approx(SHARES["sided"], abs=0.05)
    assert all(scene.count == 1 for scene in scenes if scene.position)


def test_what_judges_and_the_tokenizer_see_is_unchanged():
    _, scenes, _ = make_scenes(2000, 5)
    counts = Counter(scene.count for scene in scenes)
    assert [counts[n] / 2000 for n in (1, 2, 3)] == pytest.approx([0.7, 0.2, 0.1], abs=0.03)


def test_latents_are_the_autoencoders_and_drawn_once(out, monkeypatch):
    data = LatentScenes(out, "mini-sd3", shards=2, shard_size=12)
    assert data.latents.shape == (24, 4, 16, 16) and data.latents.dtype == torch.float16
    images, scenes, _ = make_scenes(12, latents.FIRST_SEED + 1, **SHARES)
    vae = AutoencoderKL.from_pretrained(out / "vae")
    torch.testing.assert_close(data.latents[12:].float(), encode(vae, images), atol=2e-3, rtol=2e-3)
    assert torch.equal(data.ids[12:].long(), tokenize(data.tokenizer, [scene.caption() for scene in scenes]))
    monkeypatch.setattr(latents, "draw_shard", lambda *args: pytest.fail("a shard that is there was drawn again"))
    again = LatentScenes(out, "mini-sd3", shards=2, shard_size=12)
    assert again.tokenizer.get_vocab() == data.tokenizer.get_vocab() == build_tokenizer().get_vocab()
    assert torch.equal(again.latents, data.latents) and torch.equal(again.ids, data.ids)


def test_a_model_that_is_trained_further_keeps_its_own_numbers(out):
    """Scenes captioned in a new tokenizer's numbers would teach a model that knows others each word anew."""
    shutil.copytree(Path(embedded.path("mini-sd3")) / "tokenizer", out / "mini-sd3" / "tokenizer")
    own = CLIPTokenizer.from_pretrained(out / "mini-sd3" / "tokenizer")
    assert own.get_vocab() != build_tokenizer().get_vocab()
    data = LatentScenes(out, "mini-sd3", shards=1, shard_size=12)
    _, scenes, _ = make_scenes(12, latents.FIRST_SEED, **SHARES)
    assert torch.equal(data.ids.long(), tokenize(own, [scene.caption() for scene in scenes]))
    build_tokenizer().save_pretrained(out / "mini-sd" / "tokenizer")
    with pytest.raises(ValueError, match="another tokenizer's numbers than mini-sd's"):
        LatentScenes(out, "mini-sd", shards=1, shard_size=12)


def test_a_batch_pairs_latents_with_their_captions_and_leaves_some_out(out):
    data = LatentScenes(out, "mini-sd3", shards=1, shard_size=12)
    torch.manual_seed(0)
    x, ids = data.batch(400)
    assert x.shape == (400, 4, 16, 16) and x.dtype == torch.float32 and ids.dtype == torch.int64
    rows = [int((data.latents.float() == row).flatten(1).all(1).nonzero()[0]) for row in x]
    empty = (ids == data.empty).all(1)
    assert 0.05 < empty.float().mean() < 0.15
    assert torch.equal(ids[~empty], data.ids.long()[rows][~empty])
    x, _ = data.batch(50, among=torch.tensor([3, 7]))
    assert {int((data.latents.float() == row).flatten(1).all(1).nonzero()[0]) for row in x} == {3, 7}


def test_a_file_is_whole_or_absent(tmp_path, monkeypatch):
    write_safely({"a": torch.ones(2)}, tmp_path / "x.safetensors")

    def killed(tensors, file):
        Path(file).write_bytes(b"half a fi")
        raise KeyboardInterrupt

    monkeypatch.setattr(latents, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        write_safely({"a": torch.zeros(2)}, tmp_path / "x.safetensors")
    assert load_file(tmp_path / "x.safetensors")["a"].tolist() == [1, 1]
