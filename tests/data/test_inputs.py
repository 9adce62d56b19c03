"""Inputs of the pipeline's call from columns: pictures, numbers, texts."""

import json

import pytest
from PIL import Image

from diffusers_align.data import load_prompts
from diffusers_align.data.inputs import Inputs, parse_input_columns
from diffusers_align.data.prompts import fields_of


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# columns


def loaded(folder, name="prompts.jsonl", **options):
    return load_prompts(str(folder / name), inputs=Inputs({"image": "image"}, **options), say=[].append)


def test_pictures_are_read_with_the_care_of_data_sets(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (32, 16), "red").save(tmp_path / "turned.jpg", exif=exif)
    said = []
    (prompt,) = load_prompts(write(tmp_path / "p.jsonl", [{"prompt": "x", "image": "turned.jpg"}]), inputs=Inputs({"image": "image"}), say=said.append)
    assert prompt.inputs["image"].open().size == (16, 32) and "1 pictures are turned upright as their EXIF tag says" in said[0]
    assert loaded(tmp_path, "p.jsonl", size=(8, 24))[0].inputs["image"].open().size == (24, 8)


@pytest.mark.parametrize("value, message", [
    ("none.png", "'image': no file .*none.png"), ("https://x/y.png", "'image' is a URL"), ("clip.mp4", "'image' is a film.*frames"), (None, "no 'image'"),
    ("broken.png", "'image' cannot be read: UnidentifiedImageError"),
])  # fmt: skip
def test_pictures_that_cannot_be_read_are_named_with_their_row(tmp_path, value, message):
    (tmp_path / "broken.png").write_text("text")
    with pytest.raises(ValueError, match=rf"p\.jsonl, row 1: {message}.*\(line 1\)"):
        loaded(tmp_path, write(tmp_path / "p.jsonl", [{"prompt": "x", "image": value}]))


def test_numbers_texts_and_lists_of_pictures_are_inputs_too(tmp_path):
    for i in range(2):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    (tmp_path / "p.csv").write_text("prompt,scale,negative_prompt\na,0.5,blurry.png\nb,2,\n")
    inputs = Inputs({"scale": "scale", "negative_prompt": "negative_prompt"}, frozenset({"negative_prompt"}))
    assert [p.inputs for p in load_prompts(str(tmp_path / "p.csv"), inputs=inputs)] == [
        {"scale": 0.5, "negative_prompt": "blurry.png"}, {"scale": 2, "negative_prompt": ""},
    ]  # fmt: skip
    (prompt,) = load_prompts(write(tmp_path / "p.jsonl", [{"prompt": "x", "image": ["0.png", "1.png"]}]), inputs=Inputs({"image": "image"}))
    assert [picture.open().size for picture in prompt.inputs["image"]] == [(8, 8), (8, 8)]


def test_a_picture_may_be_called_like_a_number_and_no_number_is_infinite(tmp_path):
    Image.new("L", (8, 8), 255).save(tmp_path / "123", format="PNG")
    (tmp_path / "p.csv").write_text("prompt,image,mask\nx,123,123\n")
    (prompt,) = load_prompts(str(tmp_path / "p.csv"), inputs=Inputs({"image": "image"}, pictures=("mask",)))
    assert prompt.inputs["image"].open().size == (8, 8) and fields_of([prompt])["mask"][0].size == (8, 8)
    for text in ("nan", "inf", "-Infinity"):
        (tmp_path / "q.csv").write_text(f"prompt,scale\nx,{text}\n")
        with pytest.raises(ValueError, match=f"row 1: 'scale': no file .*{text}"):
            load_prompts(str(tmp_path / "q.csv"), inputs=Inputs({"scale": "scale"}))
    (tmp_path / "r.csv").write_text("prompt,mask\nx,7\n")
    with pytest.raises(ValueError, match="row 1: 'mask': no file .*7"):
        load_prompts(str(tmp_path / "r.csv"), inputs=Inputs({}, pictures=("mask",)))


def test_pictures_for_rewards_alone_are_read_beside_their_file_and_may_be_missing(tmp_path):
    Image.new("L", (8, 8), 255).save(tmp_path / "0.png")
    rows = [{"prompt": "x", "mask": "0.png"}, {"prompt": "y", "mask": None}, {"prompt": "z"}]
    inputs = Inputs({}, size=(4, 4), pictures=("mask",))
    prompts = load_prompts(write(tmp_path / "p.jsonl", rows), inputs=inputs)
    assert [p.inputs for p in prompts] == [{}] * 3, "the pipeline does not get them"
    first, *others = fields_of(prompts)["mask"]
    assert first.size == (4, 4) and first.getpixel((0, 0)) == (255,) * 3 and others == [None, None]
    with pytest.raises(ValueError, match=r"row 1: 'mask': no file .*gone.png"):
        load_prompts(write(tmp_path / "q.jsonl", [{"prompt": "x", "mask": "gone.png"}]), inputs=inputs)
    with pytest.raises(ValueError, match="no column 'shape' for --picture_columns. It has 'prompt', 'mask'"):
        load_prompts(str(tmp_path / "p.jsonl"), inputs=Inputs({}, pictures=("shape",)))
    (tmp_path / "p.txt").write_text("a cat\n")
    with pytest.raises(ValueError, match="has no columns, so none for --picture_columns"):
        load_prompts(str(tmp_path / "p.txt"), inputs=inputs)


@pytest.mark.parametrize("words, message", [(["=a"], "neither COLUMN nor"), (["a="], "neither COLUMN nor"), (["a", "a=b"], "names 'a' twice")])
def test_malformed_input_columns(words, message):
    assert parse_input_columns(["image", "mask_image = mask"]) == {"image": "image", "mask_image": "mask"}
    with pytest.raises(ValueError, match=message):
        parse_input_columns(words)
