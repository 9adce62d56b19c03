"""The editing task: its pictures, its files, and that mini-sd3 as an editor reads them."""

import itertools
import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from diffusers_align.data import load_prompts
from diffusers_align.data.augment import to_tensor
from diffusers_align.data.inputs import Inputs
from diffusers_align.data.prompts import fields_of
from diffusers_align.embedded import edits
from diffusers_align.embedded.scenes import COLORS, parse
from diffusers_align.rewards import load_reward, score


def test_a_mask_is_white_where_the_background_is_and_black_on_the_object():
    for edit in itertools.islice(edits.edits(3, set()), 20):
        source, mask = np.asarray(edit.source).astype(int), np.asarray(edit.mask)
        assert set(np.unique(mask)) == {0, 255}
        away = np.abs(source - np.array(COLORS[edit.scene.color])).max(-1)
        assert (away[mask == 255] > 10).mean() < 0.25, "the object's soft edge, and no more"
        assert edit.scene.color != edit.color and parse(edit.wanted.caption()) == {"object": edit.scene.object, "count": 1, "color": edit.color}


def test_the_files_hold_edits_of_their_own_and_what_rewards_read(tmp_path):
    edits.write(tmp_path, {"train": 30, "heldout": 20})
    inputs = Inputs({"image": "image"}, pictures=("mask",))
    rows = {name: load_prompts(str(tmp_path / f"{name}.jsonl"), inputs=inputs, say=[].append) for name in ("train", "heldout")}
    keys = [(prompt.columns["source_prompt"], prompt.text) for name in rows for prompt in rows[name]]
    assert all(parse(prompt.text)["color"] == prompt.columns["background"] for prompt in rows["train"])
    assert [len(rows[name]) for name in rows] == [30, 20] and len(set(keys)) == 50
    columns = fields_of(rows["train"])
    sources = torch.stack([to_tensor(picture, 32, 32) for picture in columns["image"]])
    kept = score(load_reward("edit_preservation"), sources, ["x"] * 30, **columns)["reward"]
    assert (kept == 0).all(), "and no mask hides all of a picture"
    before = (tmp_path / "train.jsonl").read_bytes(), (tmp_path / "sources" / "train-007.png").read_bytes()
    edits.write(tmp_path, {"train": 30, "heldout": 20})
    assert before == ((tmp_path / "train.jsonl").read_bytes(), (tmp_path / "sources" / "train-007.png").read_bytes())


def test_the_command_writes_an_editor_that_takes_a_picture(tmp_path):
    edits.main(["--output_dir", str(tmp_path), "--num_train", "2", "--num_heldout", "1"])
    row = json.loads((tmp_path / "heldout.jsonl").read_text())
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "img2img")
    with Image.open(tmp_path / row["image"]) as picture:
        call = {"strength": 0.5, "num_inference_steps": 2, "guidance_scale": 1.0, "max_sequence_length": 1}
        assert pipe(row["prompt"], image=picture, **call).images[0].size == (32, 32)


@pytest.mark.parametrize("numbers", [("0", "0"), ("-1", "5"), ("1990", "20")])
def test_impossible_numbers_are_refused(tmp_path, numbers, capsys):
    with pytest.raises(SystemExit):
        edits.main(["--output_dir", str(tmp_path), "--num_train", numbers[0], "--num_heldout", numbers[1]])
    assert "of 2880 edits that differ" in capsys.readouterr().err
