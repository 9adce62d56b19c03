"""The command that makes the embedded models."""

import functools
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from diffusers_align import embedded
from diffusers_align.embedded import train
from diffusers_align.embedded.making import growth, mini_sd, mini_sd3
from diffusers_align.embedded.making.latents import LatentScenes

NAMES = {"sd3": "mini-sd3", "sd": "mini-sd"}


@pytest.mark.parametrize(
    "words, message",
    [
        (["sd3", "sd", "--minutes", "1"], "2 stages need as many --minutes, got 1"),
        (["vae", "--minutes", "1", "--decay"], "--decay and --shorten are for sd3 and sd, and mean nothing for vae"),
    ],
)
def test_a_command_that_makes_no_sense_is_refused(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main([*words, "--output_dir", str(tmp_path / "models")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "models").exists()


@pytest.mark.long
@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize("stage, module", [("sd3", mini_sd3), ("sd", mini_sd)])
def test_shipped_models_are_trained_further_killed_and_resumed(stage, module, tmp_path, monkeypatch, capsys):
    folder = tmp_path / NAMES[stage]
    shutil.copytree(embedded.path(NAMES[stage]), folder)
    shutil.copytree(Path(embedded.path("mini-sd3")) / "vae", tmp_path / "vae")
    monkeypatch.setattr(module, "LatentScenes", functools.partial(LatentScenes, shards=1, shard_size=16))
    monkeypatch.setattr(module, "BATCH", 4)
    monkeypatch.setattr(mini_sd, "tell_sides_apart", functools.partial(growth.tell_sides_apart, updates=5))  # tests/embedded/making/test_growth.py: it learns
    command = [stage, "--output_dir", str(tmp_path), "--threads", "1", "--minutes"]
    train.main([*command, "0.001"])
    state = load_file(tmp_path / f"{stage}.state.safetensors")
    assert state["updates"] >= 1
    part = "transformer" if stage == "sd3" else "unet"
    before, after = (load_file(f / part / "diffusion_pytorch_model.safetensors") for f in (Path(embedded.path(NAMES[stage])), folder))
    assert len(after) >= len(before), "an older mini-sd grows by a level"
    assert {value.dtype for value in after.values()} == {torch.float16}
    train.main([*command, "0.001", "--decay", "--shorten"])
    assert f"from update {int(state['updates'])}" in capsys.readouterr().out
    assert load_file(tmp_path / f"{stage}.state.safetensors")["updates"] == state["updates"]
    short, long = ((tmp_path / f"{stage}.{kind}.safetensors").stat().st_size for kind in ("short", "state"))
    assert short < 0.55 * long
    images = DiffusionPipeline.from_pretrained(folder)("a fox", num_inference_steps=1, output_type="pt")[0]
    assert images.shape == (1, 3, 32, 32) and images.isfinite().all()
