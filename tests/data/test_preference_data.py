import csv
import io
import json
import math
import pickle
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffusers_align.data import KINDS, LazyImage, balanced_batch_of, batch_of, load_preferences, parse_column_map
from diffusers_align.data.augment import Augmentation, draw_augmentations, to_tensor
from diffusers_align.data.conversions import (
    CONVERSIONS,
    apply_ties,
    pairs_to_binary,
    ranked_to_pairs,
    scored_to_binary,
    scored_to_pairs,
    scored_to_ranked,
    weight_by_prompt,
    winners,
)
from diffusers_align.data.schemas import SCHEMAS
from diffusers_align.data.sources import _parquet_files

torch.set_num_threads(1)
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
COLORS = {"red.png": RED, "green.png": GREEN, "blue.png": BLUE}


@pytest.fixture
def folder(tmp_path):
    for name, color in COLORS.items():
        Image.new("RGB", (8, 8), color).save(tmp_path / name)
    return tmp_path


def write(path, rows):
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text(json.dumps(rows) if path.suffix == ".json" else "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def color(image):
    return image.open().getpixel((0, 0))


def encoded(rgb):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), rgb).save(file, "PNG")
    return file.getvalue()


def pair(prompt="p", a="red.png", b="green.png", label=1, **more):
    return {"prompt": prompt, "image_0": a, "image_1": b, "label_0": label, **more}


# public layouts: name, kind asked for, suffix, rows, what comes out (prompt, then images as colors, then labels)

R, G, B = COLORS
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


def shown(row):
    return tuple([color(i) for i in value] if name == "images" else color(value) if name.startswith("image") else value for name, value in row.items())


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
    assert report.ties == 1 and report.bad == [(2, "human_preference is 2, but there are 2 images")]


def test_the_examples_of_the_page_load(folder):
    page = (Path(__file__).parents[2] / "docs" / "preference_data.md").read_text()
    examples = dict(re.findall(r"^\| `(\w+)` \|.*\| `(\{.*\})` \|$", page, re.MULTILINE))
    assert set(examples) == set(KINDS) and {schema.name for schema in SCHEMAS} >= {f"{kind} rows" for kind in examples}
    for i, rgb in enumerate(COLORS.values(), 1):
        Image.new("RGB", (8, 8), rgb).save(folder / f"{i}.png")
    for kind, example in examples.items():
        assert load_preferences(write(folder / "data.jsonl", [example]), kind)[1].schema == f"{kind} rows"


def test_unlabelled_rows_and_pairs_of_one_image_are_left_out_and_counted(folder):
    base = {"caption": "p", "jpg_0": R, "jpg_1": G, "label_0": 1, "has_label": True, "are_different": True}
    rows = [base, base | {"has_label": False}, base | {"are_different": False}, base | {"label_0": None}]
    loaded, report = load_preferences(write(folder / "data.jsonl", rows), "pair")
    assert len(loaded) == 1 and report.left_out == {"without a label": 2, "of twice the same image": 1}
    assert "2 rows without a label left out." in str(report) and "Prompts come from column 'caption'." in str(report)


# sources


def test_folders_of_metadata_files_and_their_splits(folder):
    write(folder / "metadata.csv", [{"prompt": "p", "image_0_file_name": R, "image_1_file_name": G, "label_0": 1}])
    assert [shown(row) for row in load_preferences(str(folder), "pair")[0]] == [("p", RED, GREEN, 1.0, 1.0)]
    (folder / "test").mkdir()
    write(folder / "test" / "metadata.jsonl", [{"prompt": "q", "chosen": "../blue.png", "rejected": "../red.png"}])
    assert [shown(row) for row in load_preferences(str(folder), "pair", split="test")[0]] == [("q", BLUE, RED, 1.0, 1.0)]
    for source, there in ((folder, "test, train"), (folder / "metadata.csv", "train")):
        with pytest.raises(ValueError, match=f"has no split 'dev', only {there}: choose one of these"):
            load_preferences(str(source), "pair", split="dev")
    (folder / "metadata.csv").rename(folder / "test.csv")
    assert load_preferences(str(folder / "test.csv"), "pair", split="test")[1].kept == 1
    with pytest.raises(ValueError, match="has no split 'train', only test"):
        load_preferences(str(folder), "pair")


@pytest.mark.parametrize(
    "files, found",
    [
        (["data/train-00000-of-00002", "data/train-00001-of-00002", "data/test-00000-of-00001"], {"train": [1, 2], "test": [0]}),
        (["data/test/0000", "data/train/0000"], {"train": [1], "test": [0], "validation": "test|train, test"}),
        (["validation-0-of-1", "validation_unique-0-of-1"], {"validation": [0], "validation_unique": [1], "train": "validation"}),
        (["test_pairs", "train_pairs", "training"], {"train": [1], "test": [0]}),
        (["0000", "trained"], {"train": [0, 1], "test": "train"}),
        (["b/held_out"], {"held_out": [0], "train": [0]}),
    ],
)
def test_parquet_files_of_a_split_are_known_by_their_names(tmp_path, files, found):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{file}.parquet").touch()
    paths = sorted(tmp_path.rglob("*.parquet"))
    for split, expected in found.items():
        if isinstance(expected, str):
            with pytest.raises(ValueError, match=f"has no split '{split}', only ({expected}): choose"):
                _parquet_files(tmp_path, split)
        else:
            assert _parquet_files(tmp_path, split) == [paths[i] for i in expected]


def test_files_that_cannot_be_parsed_are_named(folder):
    for name, content, message in (
        ("cp1252.csv", b"prompt,chosen,rejected\ncaf\xe9,red.png,green.png\n", "is not in UTF-8"),
        ("cut.json", b'[{"prompt": "p"', "is not valid JSON"),
        ("words.jsonl", b"red.png\ngreen.png\n", "has no row of named fields; the first is 'red.png'"),
        ("semicolons.csv", b"prompt;chosen;rejected\np;red.png;green.png\n", "fields are to be separated by commas"),
        ("long.csv", b"prompt,chosen,rejected\n" + b"x" * 200_000 + b",red.png,green.png\n", "cannot be read as CSV"),
    ):
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} .*{message}"):
            load_preferences(str(folder / name), "pair")


def test_winner_and_loser_folders(folder):
    for side, color_of in (("w", {"a.png": RED, "b.jpg": BLUE, "c.png": RED}), ("l", {"a.png": GREEN, "b.png": GREEN})):
        (folder / side).mkdir()
        for name, rgb in color_of.items():
            Image.new("RGB", (8, 8), rgb).save(folder / side / name, quality=100)
    (folder / "w" / "a.txt").write_text("first\n")
    (folder / "l" / "b.txt").write_text("second")
    (folder / "c.txt").write_text("third")
    loaded, report = load_preferences(str(folder), "pair")
    assert [row["prompt"] for row in loaded] == ["first", "second"]
    assert [color(loaded[0][name]) for name in ("image_0", "image_1")] == [RED, GREEN]
    assert report.bad == [(3, "no image_1")]
    for name in ("w/b.png", "l/d.tif"):
        Image.new("RGB", (8, 8), RED).save(folder / name)
    (folder / "l" / "a.txt").write_text("another")
    (folder / "l" / ".hidden").touch()
    with pytest.raises(ValueError, match="No rows are left") as error:
        load_preferences(str(folder), "pair")
    reasons = re.findall(r"row (\d): (.*)", str(error.value))
    assert [number for number, _ in reasons] == ["1", "2", "3", "4"]
    beginnings = "different captions: w/a.txt, l/a.txt", "w holds several images of one name: b.jpg, b.png", "no image_1", "l/d.tif is neither"
    for (_, reason), expected in zip(reasons, beginnings):
        assert reason.startswith(expected)


def test_sets_of_the_datasets_library(folder, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    datasets.disable_progress_bars()
    columns = {"caption": ["p", "q"], "jpg_0": [encoded(RED)] * 2, "jpg_1": [encoded(GREEN), b"broken"], "label_0": [1.0, 0.0]}
    columns |= {"image_0_uid": ["u", "u"], "image_1_uid": ["v", "v"]}
    picks = datasets.Dataset.from_dict(columns)
    trl = datasets.Dataset.from_dict({"prompt": ["p", "q"], "chosen": [encoded(BLUE), b"broken"], "rejected": [encoded(RED)] * 2})
    trl = trl.cast_column("chosen", datasets.Image()).cast_column("rejected", datasets.Image())
    ranked = datasets.Dataset.from_dict(
        {"prompt": ["p", "q"], "images": [[encoded(RED), encoded(BLUE)], [encoded(RED), b"broken"]], "ranks": [[2, 1]] * 2},
        datasets.Features(
            {"prompt": datasets.Value("string"), "images": datasets.Sequence(datasets.Image()), "ranks": datasets.Sequence(datasets.Value("int64"))}
        ),
    )
    picks.to_parquet(folder / "picks.parquet")
    datasets.DatasetDict({"train": trl}).save_to_disk(folder / "saved")
    ranked.save_to_disk(folder / "ranked")
    rows, report = load_preferences(str(folder / "picks.parquet"), "pair", ties="keep")
    assert [shown(row) for row in rows] == [("p", RED, GREEN, 1.0, 1.0)] and rows[0]["image_0"].identity == "u"
    assert report.bad[0][0] == 2 and "image_1 cannot be read: UnidentifiedImageError" in report.bad[0][1]
    for name, kind, expected, broken in (
        ("saved", "pair", ("p", BLUE, RED, 1.0, 1.0), "image_0"),
        ("ranked", "ranked", ("p", [RED, BLUE], [2, 1]), r"images[1]"),
    ):
        rows, report = load_preferences(str(folder / name), kind)
        assert [shown(row) for row in rows] == [expected]
        assert report.bad[0][0] == 2 and report.bad[0][1].startswith(f"{broken} cannot be read: UnidentifiedImageError")
    with pytest.raises(ValueError, match="has no split 'validation', only train: choose one"):
        load_preferences(str(folder / "saved"), "pair", split="validation")

    def load_dataset(name, split):
        if name != "someone/pairs":
            raise FileNotFoundError(f"Couldn't find {name}")
        return {"train": trl, "test": picks}[split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [shown(row) for row in load_preferences("someone/pairs", "pair")[0]] == [("p", BLUE, RED, 1.0, 1.0)]
    assert load_preferences("someone/pairs", "pair", split="test", max_rows=1)[1].rows == 1
    with pytest.raises(ValueError, match="'someone/other' is no file or folder here, and `datasets` cannot load its split 'train' either: Couldn't find"):
        load_preferences("someone/other", "pair")


def test_images_are_read_when_asked_for_and_survive_pickling(folder):
    rows, _ = load_preferences(write(folder / "data.jsonl", [pair()]), "pair")
    image = pickle.loads(pickle.dumps(rows))[0]["image_0"]
    Image.new("RGB", (8, 8), BLUE).save(folder / "red.png")
    assert color(image) == BLUE


def test_images_come_upright_in_rgb_on_white(folder):
    file = io.BytesIO()
    tall = Image.new("RGB", (4, 8), RED)
    exif = tall.getexif()
    exif[0x0112] = 6  # rotate by a quarter
    tall.save(file, "JPEG", exif=exif)
    assert LazyImage(file.getvalue()).open().size == (8, 4)
    assert LazyImage(Image.new("RGBA", (2, 2), (255, 0, 0, 0))).open().getpixel((0, 0)) == (255, 255, 255)
    assert LazyImage(Image.new("L", (2, 2), 7)).open().getpixel((0, 0)) == (7, 7, 7)


def test_the_content_hash_depends_on_the_content_alone(folder):
    (folder / "copy.png").write_bytes((folder / "red.png").read_bytes())
    hashes = {name: LazyImage(folder / name).content_hash() for name in ("red.png", "copy.png", "green.png")}
    assert hashes["red.png"] == hashes["copy.png"] == LazyImage((folder / "red.png").read_bytes()).content_hash() != hashes["green.png"]
    assert LazyImage(Image.new("RGB", (2, 8))).content_hash() != LazyImage(Image.new("RGB", (8, 2))).content_hash()


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


def test_a_kind_asked_for_goes_before_conversions_and_captions_come_last(folder):
    both = write(folder / "both.jsonl", [{"prompt": "p", "image": R, "label": False, "reward": 1}, {"prompt": "p", "image": G, "label": True, "reward": 0}])
    assert [load_preferences(both, kind)[1].schema for kind in ("binary", "scored", "captioned")] == ["binary rows", "scored rows", "binary rows"]
    assert [shown(row) for row in load_preferences(both, "captioned")[0]] == [("p", GREEN)]
    ranked = write(folder / "ranked.jsonl", [{"prompt_id": 1, "prompt": "p", "image": R, "rank": 1, "label": False}])
    assert load_preferences(ranked, "binary")[1].schema == "binary rows"


@pytest.mark.parametrize("found, wanted", CONVERSIONS)
def test_sets_of_another_kind_are_converted_and_the_report_says_how(folder, found, wanted):
    rows = {
        "ranked": [{"prompt": "p", "images": [R, G], "ranks": [2, 1]}],
        "scored": [{"prompt": "p", "image": R, "reward": 0}, {"prompt": "p", "image": G, "reward": 1}],
        "pair": [pair(label=0)],
        "binary": [{"prompt": "p", "image": R, "label": False}, {"prompt": "p", "image": G, "label": True}],
    }
    expected = {
        "pair": [("p", GREEN, RED, 1.0, 1.0)],
        "binary": [("p", RED, False), ("p", GREEN, True)],
        "captioned": [("p", GREEN)],
        "ranked": [("p", [RED, GREEN], [2, 1])],
    }
    loaded, report = load_preferences(write(folder / "data.jsonl", rows[found]), wanted)
    assert sorted(map(shown, loaded), key=str) == sorted(expected[wanted], key=str)
    assert f"Converted: {CONVERSIONS[found, wanted][1]}." in str(report)


# ties


@pytest.mark.parametrize("policy, labels, fate", [("drop", [1], "dropped"), ("soft", [1, 0.5], "label 0.5"), ("keep", [1, 1, 0], "both directions at half")])
def test_ties_are_never_wins(folder, policy, labels, fate):
    loaded, report = load_preferences(write(folder / "data.jsonl", [pair(), pair(label=0.5)]), "pair", ties=policy)
    assert [row["label_0"] for row in loaded] == labels and sum(row["weight"] for row in loaded) == (1 if policy == "drop" else 2)
    assert report.ties == 1 and "1 ties" in str(report) and fate in str(report)


def test_soft_labels_are_no_ties(folder):
    loaded, report = load_preferences(write(folder / "data.jsonl", [pair(label=0.51)]), "pair")
    assert loaded[0]["label_0"] == 0.51 and report.ties == 0


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


def test_sixteen_bits_are_scaled_and_float_pixels_refused(folder):
    grey = torch.tensor([[0, 128, 255]], dtype=torch.int32)
    deep = Image.fromarray((257 * grey).numpy().astype("uint16"))
    deep.save(folder / "deep.png")
    for source in (folder / "deep.png", deep):
        assert [LazyImage(source).open().getpixel((x, 0)) for x in range(3)] == [(v, v, v) for v in grey[0].tolist()]
    Image.fromarray((grey / 255).numpy()).save(folder / "float.tif")
    for verify in ("full", "header"):
        _, report = load_preferences(write(folder / "data.jsonl", [pair(), pair(a="deep.png"), pair(b="float.tif")]), "pair", verify=verify)
        assert report.bad == [(3, "image_1 cannot be read: its pixels (mode F) have no known range: save it with 8 or 16 bits a channel")]
    with pytest.raises(ValueError, match="no known range"):
        LazyImage(folder / "float.tif").open()


def test_the_content_of_a_palette_image_is_its_colors():
    one, two = (Image.new("RGB", (8, 8), rgb).convert("P", palette=Image.Palette.ADAPTIVE) for rgb in (RED, GREEN))
    assert one.tobytes() == two.tobytes()
    assert len({LazyImage(image).content_hash() for image in (one, one.copy(), two)}) == 2


def test_certain_labels_may_be_spelled_out(folder):
    rows = [pair(label=True), pair(label="False"), pair(label=False), pair(label="0.25")]
    for name in ("data.csv", "data.jsonl"):
        assert [row["label_0"] for row in load_preferences(write(folder / name, rows), "pair", bad_rows="error")[0]] == [1, 0, 0, 0.25]


def test_csv_rows_with_too_many_fields_are_bad(folder):
    (folder / "data.csv").write_text("prompt,chosen,rejected\na cat, sitting,red.png,green.png\na dog,red.png,green.png\n")
    loaded, report = load_preferences(str(folder / "data.csv"), "pair")
    assert len(loaded) == 1 and report.bad[0][0] == 1 and "more fields than columns" in report.bad[0][1]


def test_a_byte_order_mark_is_no_part_of_a_name(folder):
    (folder / "data.csv").write_text("prompt,chosen,rejected\na cat,red.png,green.png\n", encoding="utf-8-sig")
    assert load_preferences(str(folder / "data.csv"), "pair")[0][0]["prompt"] == "a cat"


def test_rankings_of_one_image_are_left_out(folder):
    rows = [{"prompt": "p", "images": [R], "ranks": [1]}, {"prompt": "p", "images": [R, G], "ranks": [1, 2]}]
    loaded, report = load_preferences(write(folder / "data.jsonl", rows), "ranked")
    assert len(loaded) == 1 and report.left_out == {"of rankings with one image": 1}


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


def test_sources_without_data(folder):
    for source, error in ((folder / "none.jsonl", "No file or folder"), (folder, "holds no preference data"), (folder / "red.png", "is no .jsonl, .json")):
        with pytest.raises(ValueError, match=error):
            load_preferences(str(source), "pair")
    with pytest.raises(ValueError, match="has no rows"):
        load_preferences(write(folder / "empty.jsonl", []), "pair")
    with pytest.raises(ValueError, match="No rows are left.\n(.|\n)*1 ties dropped"):
        load_preferences(write(folder / "ties.jsonl", [pair(label=0.5)]), "pair")


def test_image_root_and_max_rows(folder):
    (folder / "labels").mkdir()
    file = write(folder / "labels" / "data.jsonl", [pair(prompt=str(i)) for i in range(5)])
    loaded, report = load_preferences(file, "pair", image_root=str(folder), max_rows=3)
    assert [row["prompt"] for row in loaded] == ["0", "1", "2"] and report.rows == 3


# conversions


def images(*names):
    return [LazyImage(b"", uid=name) for name in names]


def names(rows):
    return [tuple(value.uid if isinstance(value, LazyImage) else value for value in row.values()) for row in rows]


def test_ranked_to_pairs():
    pairs = ranked_to_pairs(
        [{"prompt": "p", "images": images("a", "b", "c"), "ranks": [2, 1, 2]}, {"prompt": "q", "images": images("d", "e"), "ranks": [1, 2]}]
    )
    assert names(pairs) == [("p", "b", "a", 1, 1 / 3), ("p", "b", "c", 1, 1 / 3), ("p", "a", "c", 0.5, 1 / 3), ("q", "d", "e", 1, 1)]


def scored(**rewards):
    return [{"prompt": name[0], "image": LazyImage(b"", uid=name), "reward": reward} for name, reward in rewards.items()]


def test_scored_to_pairs():
    rows = scored(p1=0.1, p2=0.9, p3=0.5, q1=1.0, q2=1.0, r1=3.0)
    assert names(scored_to_pairs(rows)) == [("p", "p2", "p1", 1, 1)]
    assert names(scored_to_pairs(rows, "all")) == [("p", "p2", "p3", 1, 1 / 3), ("p", "p2", "p1", 1, 1 / 3), ("p", "p3", "p1", 1, 1 / 3)]
    assert names(scored_to_pairs(rows, "all", min_margin=0.6)) == [("p", "p2", "p1", 1, 1)]
    with pytest.raises(ValueError, match="how must be 'best_worst' or 'all', got 'some'"):
        scored_to_pairs(rows, "some")


def test_scored_to_ranked_and_binary():
    rows = scored(p1=0.1, p2=0.9, p3=0.9, q1=1.0)
    ranked = scored_to_ranked(rows)
    assert [(row["prompt"], row["ranks"]) for row in ranked] == [("p", [3, 1, 1])]
    assert [row["label"] for row in scored_to_binary(rows, threshold=0.9)] == [False, True, True, True]
    assert [row["label"] for row in scored_to_binary(scored(a=4, b=1, c=3, d=2, e=5), quantile=0.8)] == [False, False, False, False, True]
    for options in ({}, {"threshold": 0, "quantile": 0.5}):
        with pytest.raises(ValueError, match="either threshold or quantile"):
            scored_to_binary(rows, **options)


@pytest.mark.parametrize("mixed, b", [("desirable", [("p", "b", True)]), ("undesirable", [("p", "b", False)]), ("drop", [])])
def test_pairs_to_binary(mixed, b):
    win, lose, tie, soft = images("a", "b"), images("b", "c"), images("d", "c"), images("e", "f")
    pairs = [dict(prompt="p", image_0=i, image_1=j, label_0=label, weight=1) for (i, j), label in ((win, 1.0), (lose, 1.0), (tie, 0.5), (soft, 0.3))]
    expected = [("p", "a", True), *b, ("p", "c", False), ("p", "e", False), ("p", "f", True)]
    assert names(pairs_to_binary(pairs, mixed)) == expected
    if mixed == "desirable":
        assert names(winners(pairs)) == [("p", "a"), ("p", "b"), ("p", "f")]


def test_unknown_policies():
    with pytest.raises(ValueError, match="mixed must be"):
        pairs_to_binary([], "both")
    with pytest.raises(ValueError, match="ties must be"):
        apply_ties([], "win")


def test_one_image_under_two_prompts_is_judged_under_each():
    a, b = images("a", "b")
    pairs = [dict(prompt=p, image_0=a, image_1=b, label_0=label, weight=1) for p, label in (("p", 1.0), ("q", 0.0))]
    assert names(pairs_to_binary(pairs)) == [("p", "a", True), ("p", "b", False), ("q", "a", False), ("q", "b", True)]


def test_weights_by_prompt(folder):
    rows = [pair("p"), pair("p", weight=3), pair("q"), pair("r", weight=0)]
    assert [row["weight"] for row in weight_by_prompt([{"weight": 1, **row} for row in rows])] == [0.25, 0.75, 1, 0]
    loaded, _ = load_preferences(write(folder / "data.jsonl", rows), "pair", weighting="prompt")
    assert [row["weight"] for row in loaded] == [0.25, 0.75, 1, 0]


# augmentation


def gradient(width, height):
    """Red rises from left to right, green from top to bottom."""
    x, y = torch.arange(width) / (width - 1), torch.arange(height) / (height - 1)
    pixels = torch.stack([x.expand(height, width), y[:, None].expand(height, width), torch.zeros(height, width)], -1)
    return Image.fromarray((pixels * 255).byte().numpy())


def test_tensors_have_their_size_and_range():
    tensor = to_tensor(gradient(40, 20), 16, 24)
    assert tensor.shape == (3, 16, 24) and tensor.dtype == torch.float32 and 0 <= tensor.min() < 0.2 < 0.7 < tensor.max() <= 1
    assert torch.equal(to_tensor(Image.new("RGB", (8, 8), RED), 8, 8), torch.tensor([1.0, 0, 0])[:, None, None].expand(3, 8, 8))


def test_crops_keep_the_aspect_and_lie_where_they_should():
    left, centre, right = (to_tensor(gradient(200, 100), 50, 50, Augmentation(left=x)) for x in (0.0, 0.5, 1.0))
    for crop, (low, high) in ((left, (0, 0.5)), (centre, (0.25, 0.75)), (right, (0.5, 1))):
        assert crop[0, 0, 0] == pytest.approx(low, abs=0.02) and crop[0, 0, -1] == pytest.approx(high, abs=0.02)
        assert crop[1, 0, 0] == pytest.approx(0, abs=0.02) and crop[1, -1, 0] == pytest.approx(1, abs=0.02)
    assert torch.equal(to_tensor(gradient(200, 100), 50, 50, Augmentation(flip=True)), centre.flip(-1))


def test_a_pair_is_cropped_and_flipped_alike_whatever_its_sizes():
    one, two = draw_augmentations(2, seed=0, epoch=3, row=7, random_crop=True, random_flip=True)
    assert one == two
    small, large = to_tensor(gradient(120, 60), 32, 32, one), to_tensor(gradient(480, 240), 32, 32, two)
    assert (small - large).abs().max() < 0.04


def test_augmentations_depend_on_seed_epoch_and_row_alone():
    def draw(**change):
        return draw_augmentations(2, **{"seed": 0, "epoch": 0, "row": 0, "random_crop": True, "random_flip": True} | change)

    assert draw() == draw() and len({draw(**{name: 1})[0].key for name in ("seed", "epoch", "row")} | {draw()[0].key}) == 4
    independent = draw(independent=True)
    assert independent[0] == draw()[0] != independent[1]
    assert draw(random_crop=False, random_flip=False) == [Augmentation()] * 2
    flips = [draw(row=row)[0].flip for row in range(400)]
    assert 150 < sum(flips) < 250


# batches


def test_batches_walk_through_permutations():
    steps = [batch_of(step, 4, 10, seed=0) for step in range(5)]
    flat = sum(steps, [])
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10)) and flat[:10] != flat[10:] and flat[:10] != list(range(10))
    assert batch_of(3, 4, 10, seed=0) == steps[3] != batch_of(3, 4, 10, seed=1)
    assert Counter(batch_of(0, 9, 3, seed=0)) == {0: 3, 1: 3, 2: 3}
    with pytest.raises(ValueError, match="no rows"):
        batch_of(0, 1, 0, seed=0)


@pytest.mark.parametrize("world", [2, 3, 6])
def test_the_global_batch_does_not_depend_on_the_processes(world):
    classes = range(0, 20, 3), range(1, 20, 3)
    for step in range(4):
        assert sum((batch_of(step, 6 // world, 10, 0, rank, world) for rank in range(world)), []) == batch_of(step, 6, 10, 0)
        parts = (balanced_batch_of(step, 6 // world, *classes, 0, rank, world) for rank in range(world))
        assert sum(parts, []) == balanced_batch_of(step, 6, *classes, 0)


@pytest.mark.parametrize("gamma", [0, 0.1, 0.5, 0.8, 1])
def test_balanced_batches_hold_their_share_and_see_each_row_equally_often(gamma):
    desirable, undesirable = [1, 4, 6], [0, 2, 3, 5, 7]
    rows = sum((balanced_batch_of(step, 10, desirable, undesirable, 0, gamma=gamma) for step in range(30)), [])
    counts = Counter(rows)
    assert sum(counts[row] for row in desirable) == round(gamma * 300)
    for group in (desirable, undesirable):
        assert max(counts[row] for row in group) - min(counts[row] for row in group) <= 1


def test_balanced_batches_say_what_is_missing():
    with pytest.raises(ValueError, match=r"no undesirable rows, but gamma=0.8 asks for a share of 0.2 of them. Label some, or choose gamma=1"):
        balanced_batch_of(0, 2, [0], [], 0)
    with pytest.raises(ValueError, match="no desirable rows, but gamma=0.8.*choose gamma=0"):
        balanced_batch_of(0, 2, [], [0], 0)
    with pytest.raises(ValueError, match="between 0 and 1, got 8"):
        balanced_batch_of(0, 2, [0], [1], 0, gamma=8)
    assert balanced_batch_of(0, 2, [3], [], 0, gamma=1) == [3, 3]
