"""Preference data: read as it is, its report, and what is said of rows and options that are wrong."""

import pytest
from preference_rows import B, G, R, pair, write

from diffusers_align.data import load_preferences


def test_preferences_are_read_as_strictly(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "image": "x.png"}\n\n{"prompt": "b", "image": 3,}\n')
    with pytest.raises(ValueError, match="No rows are left") as error:
        load_preferences(str(tmp_path / "p.jsonl"), "captioned")
    assert "row 1: image: no file" in str(error.value) and "(line 3)" in str(error.value)


@pytest.mark.parametrize(
    "options, error",
    [
        ({"kind": "pairs"}, "kind must be one of captioned, pair, binary, scored, ranked, got 'pairs'"),
        ({"ties": "wins"}, "ties must be one of drop, soft, keep"),
        ({"bad_rows": "fix"}, "bad_rows must be one of skip, error"),
        ({"verify": "some"}, "verify must be one of full, header, none"),
        ({"weighting": "x"}, "weighting must be one of row, prompt"),
        ({"max_rows": 0}, "max_rows must be at least 1, or None for all, got 0"),
    ],
)
def test_unknown_options(folder, options, error):
    with pytest.raises(ValueError, match=error):
        load_preferences(write(folder / "data.jsonl", [pair()]), **{"kind": "pair"} | options)


def test_image_root_and_max_rows(folder):
    (folder / "labels").mkdir()
    file = write(folder / "labels" / "data.jsonl", [pair(prompt=str(i)) for i in range(5)])
    loaded, report = load_preferences(file, "pair", image_root=str(folder), max_rows=3)
    assert [row["prompt"] for row in loaded] == ["0", "1", "2"] and report.rows == 3


def test_a_column_that_is_called_group_joins_no_rankings(folder):
    """Rankings of different prompts, of prompts that their user has sorted into groups."""
    rows = [{"prompt": prompt, "images": images, "ranks": [1, 2], "group": "animals"} for prompt, images in (("a cat", [R, G]), ("a dog", [B, R]))]
    file = write(folder / "ranked.jsonl", rows)
    assert [(row["prompt"], len(row["images"])) for row in load_preferences(file, "ranked")[0]] == [("a cat", 2), ("a dog", 2)]
    assert [row["prompt"] for row in load_preferences(file, "pair")[0]] == ["a cat", "a dog"]
