"""Rows as they are used: unlabelled, equal, certain and malformed ones."""

import math
import re

import pytest
from PIL import Image
from preference_rows import G, R, pair, write

from diffusers_align.data import load_preferences

# public layouts: name, kind asked for, suffix, rows, what comes out (prompt, then images as colors, then labels)


def test_unlabelled_rows_and_pairs_of_one_image_are_left_out_and_counted(folder):
    base = {"caption": "p", "jpg_0": R, "jpg_1": G, "label_0": 1, "has_label": True, "are_different": True}
    rows = [base, base | {"has_label": False}, base | {"are_different": False}, base | {"label_0": None}]
    loaded, report = load_preferences(write(folder / "data.jsonl", rows), "pair")
    assert len(loaded) == 1 and report.left_out == {"without a label": 2, "of twice the same image": 1}
    assert "2 rows without a label left out." in str(report) and "Prompts come from column 'caption'." in str(report)


# bad rows


BAD_PAIRS = {
    "the prompt is empty": pair(prompt="  "),
    "the prompt is no text: 3": pair(prompt=3),
    "image_1: no file .*missing.png": pair(b="missing.png"),
    "image_0 is a URL, https://x/y.png: download": pair(a="https://x/y.png"),
    "image_1 cannot be read: OSError": pair(b="cut.png"),
    "image_0 cannot be read: UnidentifiedImageError": pair(a="text.png"),
    "image_0 is neither a path, bytes nor an image but a int": pair(a=3),
    "no image_1": pair(b=None),
    r"label_0 is 1.5, outside \[0, 1\]": pair(label=1.5),
    "label_0 is nan": pair(label=math.nan),
    "label_0 is not a number: 'left'": pair(label="left"),
    r"weight is -1, outside \[0, inf\]": pair(weight=-1),
    "not a row of named fields: '{broken'": "{broken",
}


@pytest.fixture
def broken(folder):
    Image.effect_noise((64, 64), 90).save(folder / "noise.png")
    data = (folder / "noise.png").read_bytes()
    (folder / "cut.png").write_bytes(data[: len(data) // 2])
    (folder / "text.png").write_text("no image")
    return folder


def test_bad_rows_are_skipped_and_listed_with_their_numbers(broken):
    loaded, report = load_preferences(write(broken / "data.jsonl", [pair(), *BAD_PAIRS.values(), pair()]), "pair")
    assert len(loaded) == 2 and [number for number, _ in report.bad] == list(range(2, 2 + len(BAD_PAIRS)))
    for (_, reason), expected in zip(report.bad, BAD_PAIRS):
        assert re.match(expected, reason), (reason, expected)
    assert "13 bad rows skipped:\n  row 2: the prompt is empty\n" in str(report) and str(report).endswith("and 3 more")


@pytest.mark.parametrize("reason", BAD_PAIRS)
def test_bad_rows_are_fatal_if_asked(broken, reason):
    with pytest.raises(ValueError, match=f"data.jsonl, row 2: {reason}"):
        load_preferences(write(broken / "data.jsonl", [pair(), BAD_PAIRS[reason]]), "pair", bad_rows="error")


@pytest.mark.parametrize(
    "kind, row, reason",
    [
        ("scored", {"image": R, "reward": math.nan}, "reward is nan"),
        ("scored", {"image": R, "reward": math.inf}, "reward is inf"),
        ("scored", {"image": R, "reward": None}, "no reward"),
        ("binary", {"image": R, "label": "maybe"}, "label must be true or false, 1 or 0, got 'maybe'"),
        ("ranked", {"images": [R, G], "ranks": [1]}, "2 images but 1 ranks"),
        ("ranked", {"images": [R, "missing.png"], "ranks": [1, 2]}, r"images\[1\]: no file"),
        ("ranked", {"images": [], "ranks": []}, "no images"),
        ("ranked", {"images": R, "ranks": [1]}, "images is not a list: 'red.png'"),
        ("captioned", {"image": ""}, "no image"),
    ],
)
def test_bad_rows_of_other_kinds(folder, kind, row, reason):
    with pytest.raises(ValueError, match=f"row 1: {reason}"):
        load_preferences(write(folder / "data.jsonl", [{"prompt": "p"} | row]), kind, bad_rows="error")


def test_how_thoroughly_images_are_checked(broken):
    file = write(broken / "data.jsonl", [pair(), pair(b="cut.png"), pair(b="text.png")])
    assert [len(load_preferences(file, "pair", verify=how)[0]) for how in ("full", "header", "none")] == [1, 2, 3]


def test_certain_labels_may_be_spelled_out(folder):
    rows = [pair(label=True), pair(label="False"), pair(label=False), pair(label="0.25")]
    for name in ("data.csv", "data.jsonl"):
        assert [row["label_0"] for row in load_preferences(write(folder / name, rows), "pair", bad_rows="error")[0]] == [1, 0, 0, 0.25]


def test_rankings_of_one_image_are_left_out(folder):
    rows = [{"prompt": "p", "images": [R], "ranks": [1]}, {"prompt": "p", "images": [R, G], "ranks": [1, 2]}]
    loaded, report = load_preferences(write(folder / "data.jsonl", rows), "ranked")
    assert len(loaded) == 1 and report.left_out == {"of rankings with one image": 1}
