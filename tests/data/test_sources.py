"""Where rows come from: files, folders, splits and sets of the datasets library."""

import re

import pytest
from PIL import Image
from preference_rows import BLUE, GREEN, RED, G, R, color, encoded, pair, shown, write

from diffusers_align.data import load_preferences
from diffusers_align.data.sources import _Named, _parquet_files, open_table

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


@pytest.mark.parametrize("stored", ["saved", "parquet"])
@pytest.mark.parametrize("classes, good", [(["bad", "good"], None), (["false", "true"], "true"), (["yes", "no"], "yes"), (["1", "0"], "1")])
def test_classes_are_read_by_their_names(folder, monkeypatch, stored, classes, good):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    label = datasets.ClassLabel(names=classes)
    features = datasets.Features({"prompt": datasets.Value("string"), "image": datasets.Image(), "label": label})
    images = {"image": [encoded(RED), encoded(GREEN), encoded(BLUE)], "label": [0, 1, -1]}
    made = datasets.Dataset.from_dict({"prompt": ["p", "q", "r"], **images}, features)
    place = folder / ("set" if stored == "saved" else "set.parquet")
    made.save_to_disk(place) if stored == "saved" else made.to_parquet(place)
    if good is None:
        with pytest.raises(ValueError, match="row 1: label must be true or false, 1 or 0, got 'bad'"):
            load_preferences(str(place), "binary")
    else:
        rows, report = load_preferences(str(place), "binary")
        assert [shown(row) for row in rows] == [("p", RED, classes[0] == good), ("q", GREEN, classes[1] == good)]
        assert report.left_out == {"without a label": 1}


def test_classes_inside_lists_and_splits_of_diffusion_kto_too(folder):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    split = datasets.ClassLabel(names=["exclusive_lose", "exclusive_win"])
    features = datasets.Features({"prompt": datasets.Value("string"), "image": datasets.Image(), "split": split})
    kto = {"prompt": ["p", "q"], "image": [encoded(RED), encoded(GREEN)], "split": [1, 0]}
    datasets.Dataset.from_dict(kto, features).save_to_disk(folder / "kto")
    assert [shown(row) for row in load_preferences(str(folder / "kto"), "binary")[0]] == [("p", RED, True), ("q", GREEN, False)]
    ranks = datasets.Sequence(datasets.ClassLabel(names=["2", "1"]))
    features = datasets.Features({"prompt": datasets.Value("string"), "images": datasets.Sequence(datasets.Image()), "ranks": ranks})
    ranked = {"prompt": ["p"], "images": [[encoded(RED), encoded(GREEN)]], "ranks": [[0, 1]]}
    datasets.Dataset.from_dict(ranked, features).save_to_disk(folder / "ranked")
    assert load_preferences(str(folder / "ranked"), "ranked")[0][0]["ranks"] == [2, 1]


def test_classes_inside_objects_of_lists(folder):
    datasets = pytest.importorskip("datasets")
    label = datasets.ClassLabel(names=["good", "bad"])
    features = datasets.Features({"prompt": datasets.Value("string"), "image": datasets.Image(), "votes": [{"who": datasets.Value("string"), "said": label}]})
    made = datasets.Dataset.from_dict({"prompt": ["p"], "image": [encoded(RED)], "votes": [[{"who": "a", "said": 1}, {"who": "b", "said": 0}]]}, features)
    made.save_to_disk(folder / "voted")
    (row,) = open_table(str(folder / "voted"), "train").rows
    assert [vote["said"] for vote in row["votes"]] == ["bad", "good"]
    of_lists = _Named(type("Rows", (list,), {"features": {"votes": [{"said": label}]}})([{"votes": {"said": [1, 0]}}]))
    assert of_lists[0] == {"votes": {"said": ["bad", "good"]}}, "as datasets before 4 have it"


@pytest.mark.parametrize("second", ["metadata.csv", "train/metadata.jsonl", "w and l"])
def test_of_two_descriptions_none_is_taken(folder, second):
    write(folder / "metadata.jsonl", [pair()])
    if second == "w and l":
        (folder / "w").mkdir()
        (folder / "l").mkdir()
    else:
        (folder / second).parent.mkdir(exist_ok=True)
        write(folder / second, [pair(), pair()])
    names = r"the folders w and l" if second == "w and l" else re.escape(second)
    with pytest.raises(ValueError, match=f"describes its data more than once: metadata.jsonl, {names}. Name the one to read"):
        load_preferences(str(folder), "pair")
    assert load_preferences(str(folder / "metadata.jsonl"), "pair")[1].kept == 1


# bad rows


def test_csv_rows_with_too_many_fields_are_bad(folder):
    (folder / "data.csv").write_text("prompt,chosen,rejected\na cat, sitting,red.png,green.png\na dog,red.png,green.png\n")
    loaded, report = load_preferences(str(folder / "data.csv"), "pair")
    assert len(loaded) == 1 and report.bad[0][0] == 1 and "more fields than columns" in report.bad[0][1]


def test_a_byte_order_mark_is_no_part_of_a_name(folder):
    (folder / "data.csv").write_text("prompt,chosen,rejected\na cat,red.png,green.png\n", encoding="utf-8-sig")
    assert load_preferences(str(folder / "data.csv"), "pair")[0][0]["prompt"] == "a cat"


def test_sources_without_data(folder):
    for source, error in ((folder / "none.jsonl", "No file or folder"), (folder, "holds no preference data"), (folder / "red.png", "is no .jsonl, .json")):
        with pytest.raises(ValueError, match=error):
            load_preferences(str(source), "pair")
    with pytest.raises(ValueError, match="has no rows"):
        load_preferences(write(folder / "empty.jsonl", []), "pair")
    with pytest.raises(ValueError, match="No rows are left.\n(.|\n)*1 ties dropped"):
        load_preferences(write(folder / "ties.jsonl", [pair(label=0.5)]), "pair")
