"""What a set of unknown columns is told."""

import json

import pytest

from diffusers_align.data import load_preferences


@pytest.mark.parametrize("columns, expected", [
    ("text winner loser", "prompt=text,chosen=winner,rejected=loser"), ("prompt imgBetter imgWorse", "chosen=imgBetter,rejected=imgWorse"),
    ("caption left right label", "prompt=caption,image_0=left,image_1=right,label_0=label"),
])  # fmt: skip
def test_an_unknown_layout_is_told_the_map_that_its_names_suggest(tmp_path, columns, expected):
    (tmp_path / "p.jsonl").write_text(json.dumps(dict.fromkeys(columns.split(), "x")))
    with pytest.raises(ValueError) as error:
        load_preferences(str(tmp_path / "p.jsonl"), "pair")
    assert f"--column_map '{expected}'" in str(error.value)
    assert f"Its columns: {', '.join(columns.split())}." in str(error.value), "no other than the file has"


@pytest.mark.parametrize("columns, expected", [
    ("words img", "rename words to prompt, img to image."), ("a b", "Rename the columns that hold what is missing: prompt, image."),
])  # fmt: skip
def test_where_there_is_no_map_new_names_are_advised(tmp_path, columns, expected):
    (tmp_path / "p.jsonl").write_text(json.dumps(dict.fromkeys(columns.split(), "x")))
    with pytest.raises(ValueError) as error:
        load_preferences(str(tmp_path / "p.jsonl"), "captioned", mappable=False)
    assert expected in str(error.value) and "--column_map" not in str(error.value)
