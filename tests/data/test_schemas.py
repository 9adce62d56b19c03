"""Public layouts of preference data: known by their columns, and the maps that rename them."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image
from preference_rows import BLUE, COLORS, GREEN, RED, B, G, R, pair, shown, write

from diffusers_align.data import KINDS, load_preferences, parse_column_map
from diffusers_align.data.schemas import SCHEMAS

# public layouts: name, kind asked for, suffix, rows, what comes out (prompt, then images as colors, then labels)


LAYOUTS = {
    "pair rows": ("pair", "jsonl", [pair(weight=0.25)], [("p", RED, GREEN, 1.0, 0.25)]),
    "Pick-a-Pic": (
        "pair",
        "jsonl",
        [{"caption": "p", "jpg_0": R, "jpg_1": G, "label_0": 0, "label_1": 1, "has_label": True, "are_different": True, "num_example_per_prompt": 4}],
        [("p", RED, GREEN, 0.0, 1.0)],
    ),
    "invoke-training": ("pair", "jsonl", [{"prompt": "p", "image_0": R, "image_1": G, "prefer_0": False, "prefer_1": True}], [("p", RED, GREEN, 0.0, 1.0)]),
    "HPDv3": ("pair", "json", [{"prompt": "p", "path1": R, "path2": G, "model1": "m", "confidence": 0.9}], [("p", RED, GREEN, 1.0, 1.0)]),
    "ImageRewardDB pairs": ("pair", "json", [{"prompt": "p", "img_better": R, "img_worse": B}], [("p", RED, BLUE, 1.0, 1.0)]),
    "chosen/rejected": ("pair", "csv", [{"prompt": "p", "chosen": G, "rejected": R}], [("p", GREEN, RED, 1.0, 1.0)]),
    "open-image-preferences (Argilla)": (
        "pair",
        "jsonl",
        [{"id": "1", "images": {"image_1": R, "image_2": G, "prompt": "p"}, "preference.responses": ["image_2", "image_2", "both_good", "image_1"]}],
        [("p", RED, GREEN, 0.375, 1.0)],
    ),
    "HPDv1/HPDv2 train": ("pair", "json", [{"prompt": "p", "file_path": [R, G], "human_preference": [0, 1]}], [("p", GREEN, RED, 1.0, 1.0)]),
    "HPDv2 test": (
        "ranked",
        "json",
        [{"prompt": "p", "image_path": [R, G, B], "rank": [2, 0, 1], "raw_annotations": []}],
        [("p", [RED, GREEN, BLUE], [2, 0, 1])],
    ),
    "ImageRewardDB": (
        "ranked",
        "json",
        [
            {"prompt_id": "1", "prompt": "p", "image_path": R, "rank": 2},
            {"prompt_id": "2", "prompt": "q", "image_path": R, "rank": 1},
            {"prompt_id": "1", "prompt": "p", "image_path": G, "rank": 1},
            {"prompt_id": "2", "prompt": "q", "image_path": B, "rank": 1},
        ],
        [("p", [RED, GREEN], [2, 1]), ("q", [RED, BLUE], [1, 1])],
    ),
    "ImageReward groups": ("ranked", "json", [{"prompt": "p", "generations": [R, G], "ranking": [1, 2]}], [("p", [RED, GREEN], [1, 2])]),
    "ranked rows": ("ranked", "csv", [{"prompt": "p", "images": json.dumps([R, G]), "ranks": "[2, 1]"}], [("p", [RED, GREEN], [2, 1])]),
    "Diffusion-KTO": (
        "binary",
        "csv",
        [{"file_name": name, "caption": "p", "split": split} for name, split in ((R, "exclusive_win"), (G, "exclusive_lose"), (B, "intersections"))],
        [("p", RED, True), ("p", GREEN, False), ("p", BLUE, True)],
    ),
    "prompt/completion/label": ("binary", "jsonl", [{"prompt": "p", "completion": R, "label": False}], [("p", RED, False)]),
    "binary rows": (
        "binary",
        "csv",
        [{"prompt": "p", "image": R, "label": "True"}, {"prompt": "p", "image": G, "label": "0"}],
        [("p", RED, True), ("p", GREEN, False)],
    ),
    "scored rows": ("scored", "csv", [{"prompt": "p", "image": R, "reward": "-1.5"}], [("p", RED, -1.5)]),
    "captioned rows": ("captioned", "jsonl", [{"file_name": R, "text": " p "}], [("p", RED)]),
}


def test_every_schema_has_an_example():
    assert {schema.name for schema in SCHEMAS} == set(LAYOUTS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_public_layouts_are_recognised_by_their_columns(folder, name):
    kind, suffix, rows, expected = LAYOUTS[name]
    loaded, report = load_preferences(write(folder / f"data.{suffix}", rows), kind)
    assert [shown(row) for row in loaded] == expected
    assert report.schema == name and report.rows == len(rows) and report.kept == len(expected) and not report.bad
    assert all(tuple(row)[: len(KINDS[kind])] == KINDS[kind] for row in loaded)


def test_hpd_v1_names_the_preferred_image_by_its_index(folder):
    rows = [{"prompt": "p", "file_path": [R, G, B], "human_preference": 2}, {"prompt": "p", "file_path": [R, G], "human_preference": 2}]
    loaded, report = load_preferences(write(folder / "data.json", rows), "pair")
    assert sorted(map(shown, loaded)) == sorted([("p", BLUE, RED, 1.0, 1 / 3), ("p", BLUE, GREEN, 1.0, 1 / 3)])
    assert report.ties == 1 and report.bad == [(2, "human_preference is 2, neither the number of one of 2 images nor a list of 1 and 0")]


@pytest.mark.parametrize("suffix", ["json", "csv"])
@pytest.mark.parametrize("preference, wins", [([1, 0], 0), ([0, 1], 1), (0, 0), (1, 1), ([True, False], 0), (1.0, 1), (True, None), ("b.png", None)])
def test_a_preference_means_the_same_in_every_kind_of_file(folder, suffix, preference, wins):
    as_text = suffix == "csv"
    row = {"prompt": "p", "file_path": json.dumps([R, G]) if as_text else [R, G], "human_preference": json.dumps(preference) if as_text else preference}
    file = write(folder / f"data.{suffix}", [row])
    if wins is None:
        with pytest.raises(ValueError, match="neither the number of one of 2 images nor a list of 1 and 0"):
            load_preferences(file, "pair")
    else:
        assert [shown(row)[1] for row in load_preferences(file, "pair")[0]] == [(RED, GREEN)[wins]]


def test_rankings_are_of_one_prompt(folder):
    def row(identity, prompt, image, rank):
        return {"prompt_id": identity, "prompt": prompt, "image_path": image, "rank": rank}

    rows = [row(1, "a cat", R, 1), row(1, "a dog", G, 2), row("", "a fox", R, 1), row("", "a fox", B, 2), row(1, "a cat", B, 2)]
    loaded, report = load_preferences(write(folder / "data.jsonl", rows), "pair")
    assert [shown(row)[:3] for row in loaded] == [("a cat", RED, BLUE)], "an empty number joins nothing"
    assert report.left_out["of rankings with one image"] == 3


def test_a_broken_first_row_does_not_hide_the_layout(folder):
    rows = [{"prompt": "p", "image_path": [R, G], "rank": None}, {"prompt": "p", "image_path": [R, G], "rank": [1, 2]}]
    loaded, report = load_preferences(write(folder / "data.jsonl", rows), "ranked")
    assert report.schema == "HPDv2 test" and [number for number, _ in report.bad] == [1] and loaded[0]["ranks"] == [1, 2]
    ranks = [{"prompt": "p", "image_path": json.dumps([R, G]), "rank": "[2, 1]"}]
    assert load_preferences(write(folder / "data.csv", ranks), "ranked")[0][0]["ranks"] == [2, 1]


def test_an_image_against_itself_is_told_of_every_layout(folder):
    rows = [{"prompt": "p", "image": R, "reward": reward} for reward in (1, 3)]
    assert "1 images are both sides of their own pair" in str(load_preferences(write(folder / "data.jsonl", rows), "pair")[1])


def test_the_examples_of_the_page_load(folder):
    page = (Path(__file__).parents[2] / "docs" / "preference_data.md").read_text()
    examples = dict(re.findall(r"^\| `(\w+)` \|.*\| `(\{.*\})` \|$", page, re.MULTILINE))
    assert set(examples) == set(KINDS) and {schema.name for schema in SCHEMAS} >= {f"{kind} rows" for kind in examples}
    for i, rgb in enumerate(COLORS.values(), 1):
        Image.new("RGB", (8, 8), rgb).save(folder / f"{i}.png")
    for kind, example in examples.items():
        assert load_preferences(write(folder / "data.jsonl", [example]), kind)[1].schema == f"{kind} rows"


# columns


def test_column_maps(folder):
    file = write(folder / "data.csv", [{"words": "p", "left": R, "right": G, "score": 0.5, "label_0": 1}])
    mapping = parse_column_map(" prompt=words, image_0=left,image_1 = right ")
    assert mapping == {"prompt": "words", "image_0": "left", "image_1": "right"}
    assert shown(load_preferences(file, "pair", column_map=mapping)[0][0]) == ("p", RED, GREEN, 1.0, 1.0)
    swapped = {"prompt": "words", "chosen": "right", "rejected": "left"}
    assert shown(load_preferences(file, "pair", column_map=swapped)[0][0]) == ("p", GREEN, RED, 1.0, 1.0)
    with pytest.raises(ValueError, match="no column 'caption'. It has words, left, right, score, label_0"):
        load_preferences(file, "pair", column_map={"prompt": "caption"})


@pytest.mark.parametrize("text, error", [("prompt", "'prompt' is not NAME=COLUMN. Example"), ("prompt=", "is not NAME"), ("a=b,a=c", "names 'a' twice")])
def test_malformed_column_maps(text, error):
    with pytest.raises(ValueError, match=error):
        parse_column_map(text)


def test_unknown_columns_say_what_was_found_and_needed_and_how_to_map(folder):
    file = write(folder / "data.jsonl", [{"left": R, "right": G, "text": "p"}])
    with pytest.raises(ValueError) as error:
        load_preferences(file, "pair")
    for part in (
        "Its columns: left, right, text",
        "Needed: prompt, image_0, image_1, label_0",
        "prompt, chosen, rejected",
        "--column_map 'image_0=YOUR_COLUMN,image_1=YOUR_COLUMN,label_0",
    ):
        assert part in str(error.value)
