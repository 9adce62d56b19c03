"""What the embedded models are taught with."""

import hashlib
import json
import math
import random
from pathlib import Path

import pytest
import torch
import transformers
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from diffusers_align import embedded
from diffusers_align.embedded import scenes
from diffusers_align.embedded.teaching import build_tokenizer, contrast, rename_for_every_version, save_half


@pytest.mark.parametrize(
    "file", sorted(Path(embedded.path("mini-sd")).parent.glob("mini-*/text_encoder*/model.safetensors")), ids=lambda file: str(file.parent)
)
def test_text_models_are_named_as_every_version_of_transformers_looks_for_them(file, tmp_path):
    names = set(load_file(file))
    clip = json.loads((file.parent / "config.json").read_text())["architectures"][0].startswith("CLIP")
    assert clip == all(name.startswith(("text_model.", "text_projection.")) for name in names)
    if clip:
        bare = {name.removeprefix("text_model."): value for name, value in load_file(file).items()}
        save_file(bare, tmp_path / "model.safetensors")
        rename_for_every_version(tmp_path / "model.safetensors")
        assert set(load_file(tmp_path / "model.safetensors")) >= {name for name in names if name.startswith("text_model.")}
    model = getattr(transformers, json.loads((file.parent / "config.json").read_text())["architectures"][0])
    _, found = model.from_pretrained(file.parent, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]


def test_a_saved_model_is_in_half_precision_and_names_no_folder(tmp_path):
    vae = AutoencoderKL.from_pretrained(embedded.path("mini-sd3") + "/vae", torch_dtype=torch.float32)
    save_half(vae, tmp_path)
    assert "embedded" not in (tmp_path / "config.json").read_text()
    assert {value.dtype for value in load_file(tmp_path / "diffusion_pytorch_model.safetensors").values()} == {torch.float16}
    assert next(vae.parameters()).dtype == torch.float32


def test_every_word_of_a_caption_is_one_token():
    tokenizer, rng = build_tokenizer(), random.Random(1)
    for _ in range(100):
        caption = scenes.sample_scene(rng).caption()
        assert len(tokenizer(caption).input_ids) == len(caption.split()) + 2


def test_tokens_have_the_same_numbers_in_every_process():
    vocab = build_tokenizer().get_vocab()
    assert sorted(vocab.values()) == list(range(len(vocab)))
    found = hashlib.sha256(json.dumps(sorted(vocab.items())).encode()).hexdigest()
    assert found == "aecd848164169757841cb96e8d7c00766b1ff3437e03917f5ec6d874ce772bc0", "models that are there would read other words"


def test_the_contrast_leaves_out_pairs_with_equal_captions():
    logits = torch.tensor([[2.0, 9.0, 1.0], [9.0, 3.0, 0.0], [0.0, 1.0, 4.0]], dtype=torch.float64)
    images = [math.log1p(math.exp(1 - 2)), math.log1p(math.exp(0 - 3)), math.log1p(math.exp(0 - 4) + math.exp(1 - 4))]
    texts = [math.log1p(math.exp(0 - 2)), math.log1p(math.exp(1 - 3)), math.log1p(math.exp(1 - 4) + math.exp(0 - 4))]
    assert float(contrast(logits, torch.tensor([7, 7, 8]))) == pytest.approx((sum(images) + sum(texts)) / 6, rel=1e-12)
