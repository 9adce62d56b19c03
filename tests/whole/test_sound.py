"""A training on sound from end to end: a pipeline from its folder, a reward of sounds, and all that the run leaves for people."""

import importlib.util
import json
import wave
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from diffusers_align import Policy
from diffusers_align.rewards.spectral_centroid import spectral_centroid
from diffusers_align.training.offline.data_latents import LatentImages
from diffusers_align.training.report.pictures import to_pil
from diffusers_align.training.report.sounds import spectrogram
from tests.families.cases import audio

ROOT = Path(__file__).parents[2]
PROMPTS = ["a bell", "a drum"]


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "training_scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A sound pipeline's folder, and prompts."""
    folder = tmp_path_factory.mktemp("task")
    audio.CASES["AudioLDM2Pipeline"][0].build().save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder


MODEL = ("--num_inference_steps", "3", "--guidance_scale", "3", "--call_kwargs", '{"audio_length_in_s": 0.032}')


@pytest.fixture(scope="module")
def run(task):
    out = task / "out"
    given = {
        "pretrained_model_name_or_path": task / "model", "prompts": task / "prompts.txt", "reward": "spectral_centroid", "output_dir": out,
        "num_samples_per_epoch": 4, "train_batch_size": 2, "num_epochs": 2, "rank": 2, "learning_rate": 3e-3, "num_eval_samples": 4,
        "num_validation_images": 2, "validation_epochs": 1, "checkpointing_epochs": 2, "per_prompt_stat_min_count": 2,
    }  # fmt: skip
    script("train_ddpo").main([*(word for name, value in given.items() for word in (f"--{name}", str(value))), *MODEL, "--vae_slicing"])
    return out


def read_wav(path):
    """(C, T) in [-1, 1], and the rate."""
    with wave.open(str(path)) as file:
        values = np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, file.getnchannels()).T / 32767
        return values.astype(np.float32), file.getframerate()


def test_a_lora_was_trained_by_the_reward(run):
    lora = load_file(run / "pytorch_lora_weights.safetensors")
    assert any(name.endswith(("lora_B.weight", "lora.up.weight")) and value.abs().max() > 0 for name, value in lora.items())
    rewards = [json.loads(line)["reward"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rewards) == 2 and all(0 < reward < 8 for reward in rewards), "kHz, below half of 16 kHz"


def test_sounds_are_left_as_files_with_what_was_scored(run):
    for folder in ("sounds/before", "sounds/after", "samples/epoch-0001", "samples/epoch-0002"):
        files = sorted(path.name for path in (run / folder).iterdir())
        assert files == ["1.wav", "2.wav"], folder
    (first, rate), (second, _) = (read_wav(run / "sounds" / "before" / f"{i}.wav") for i in (1, 2))
    assert rate == 16000 and first.shape == (1, 512) and np.abs(first).max() > 0.001 and not np.array_equal(first, second)
    assert not np.array_equal(first, read_wav(run / "sounds" / "after" / "1.wav")[0]), "the LoRA makes a difference"
    assert 0 < float(spectral_centroid(torch.from_numpy(first)[None], ["x"], rate)) < 8


def test_pictures_are_spectrograms_of_these_sounds(run):
    with Image.open(run / "before_after.png") as sheet:
        boxes, captions = json.loads(sheet.text["cells"]), json.loads(sheet.text["captions"])
        assert captions == [f"{prompt} (0.032 s, up to 8 kHz)" for prompt in PROMPTS] and len(boxes) == 4
        shown = np.asarray(sheet.crop(boxes[0]).convert("RGB"), float)
    expected = np.asarray(to_pil(spectrogram(torch.from_numpy(read_wav(run / "sounds" / "before" / "1.wav")[0]))).resize(shown.shape[1::-1]), float)
    assert shown.std() > 10 and np.abs(shown - expected).mean() < 8, "16 bits and resizing move it a little"
    assert (run / "samples" / "epoch-0002.png").is_file()


def test_the_card_plays_sounds(run):
    _, front, text = (run / "README.md").read_text().split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["pipeline_tag"] == "text-to-audio"
    assert [entry["output"]["url"] for entry in front["widget"]] == ["widget/1.wav", "widget/2.wav"]
    assert np.array_equal(read_wav(run / "widget" / "1.wav")[0], read_wav(run / "sounds" / "after" / "1.wav")[0])
    assert "4 sounds" in text and "The pictures are spectrograms." in text and "`sounds/`" in text


def test_an_evaluation_compares_sounds(run, task):
    out = task / "evaluation"
    given = {
        "pretrained_model_name_or_path": task / "model", "lora": run, "lora_names": "bright", "prompts": task / "prompts.txt", "reward": "spectral_centroid",
        "output_dir": out, "num_samples": 4, "kl_samples": 2, "num_grid_images": 2, "batch_size": 2,
    }  # fmt: skip
    script("evaluate").main([*(word for name, value in given.items() for word in (f"--{name}", str(value))), *MODEL])
    for name in ("base", "bright"):
        assert sorted(path.name for path in (out / "sounds" / name).iterdir()) == ["1.wav", "2.wav"]
    assert "4 sounds a model" in (out / "evaluation.md").read_text() and "**spectral_centroid**" in (out / "evaluation.md").read_text()
    models = json.loads((out / "evaluation.json").read_text())["models"]
    assert 0 < models["base"]["rewards"]["spectral_centroid"]["mean"] < 8
    with Image.open(out / "evaluation.png") as sheet:
        assert np.asarray(sheet.crop(json.loads(sheet.text["cells"])[0]).convert("L"), float).std() > 10


def test_a_reward_of_pictures_is_refused(task, tmp_path):
    given = {
        "pretrained_model_name_or_path": task / "model", "prompts": task / "prompts.txt", "reward": "jpeg_compressibility", "output_dir": tmp_path / "out",
        "num_samples_per_epoch": 2, "train_batch_size": 2, "num_epochs": 1, "rank": 2, "num_eval_samples": 2, "num_validation_images": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match="'jpeg_compressibility' judges pictures, and these are sounds .*spectral_centroid"):
        script("train_ddpo").main([*(word for name, value in given.items() for word in (f"--{name}", str(value))), *MODEL])


def test_data_sets_of_pictures_are_refused(task):
    policy = Policy(DiffusionPipeline.from_pretrained(task / "model"), num_inference_steps=2, audio_length_in_s=0.032)
    with pytest.raises(ValueError, match="AudioLDM2Pipeline makes sounds, and data sets hold pictures"):
        LatentImages(SimpleNamespace(args=Namespace(cache_dir=None)), policy, "a bell")


def test_the_gradient_of_a_reward_comes_through_a_sound(task, tmp_path):
    given = {
        "pretrained_model_name_or_path": task / "model", "prompts": task / "prompts.txt", "reward": "spectral_centroid", "output_dir": tmp_path / "out",
        "num_samples_per_epoch": 2, "train_batch_size": 2, "num_epochs": 1, "rank": 2, "num_eval_samples": 2, "num_validation_images": 1, "learning_rate": 0.01,
    }  # fmt: skip
    script("train_draft").main([*(word for name, value in given.items() for word in (f"--{name}", str(value))), *MODEL])
    lora = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert any(name.endswith(("lora_B.weight", "lora.up.weight")) and value.abs().max() > 0 for name, value in lora.items())
