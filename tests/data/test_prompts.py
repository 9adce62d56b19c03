"""Prompt files and shipped sets, and which prompts an epoch asks for."""

import csv
import json
import random
from collections import Counter
from pathlib import Path

import pytest

from diffusers_align.data import Prompt, load_prompts, prompts_of_epoch
from diffusers_align.data import prompts as prompts_module
from diffusers_align.data.prompts import shipped_sets
from diffusers_align.embedded.scenes import OBJECTS, Scene, parse
from diffusers_align.rewards import score
from diffusers_align.rewards.ocr import quoted

# reading


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_text_files_hold_a_prompt_a_line(tmp_path):
    file = write(tmp_path / "prompts.txt", "a cat\n\n  ein großer Hund, ‘nachts’ \n\t\n猫")
    assert load_prompts(file) == [Prompt("a cat"), Prompt("ein großer Hund, ‘nachts’"), Prompt("猫")]


def test_jsonl_files_keep_their_other_columns_and_types(tmp_path):
    rows = [{"prompt": "a cat", "count": 1, "tags": ["x"]}, {"prompt": " two dogs ", "count": 2, "tags": None}]
    file = write(tmp_path / "prompts.jsonl", "\n\n".join(map(json.dumps, rows)) + "\n")
    assert load_prompts(file) == [Prompt("a cat", {"count": 1, "tags": ["x"]}), Prompt("two dogs", {"count": 2, "tags": None})]


def test_csv_files_keep_their_other_columns(tmp_path):
    file = write(tmp_path / "prompts.csv", 'id,prompt,text\n7,"a cat, sitting",OCR\n8,"two\nlines",\n')
    assert load_prompts(file) == [Prompt("a cat, sitting", {"id": "7", "text": "OCR"}), Prompt("two\nlines", {"id": "8", "text": ""})]


def test_the_prompts_column_can_be_named(tmp_path):
    file = write(tmp_path / "prompts.jsonl", '{"caption": "a cat", "prompt": "other"}')
    assert load_prompts(file, column="caption") == [Prompt("a cat", {"prompt": "other"})]


def test_a_column_of_a_file_without_columns_is_said():
    said = []
    assert load_prompts("simple_animals", column="caption", say=said.append) == load_prompts("simple_animals")
    assert len(said) == 1 and said[0].endswith("simple_animals.txt: it has no columns, so that --prompt_column caption has no effect.")


def test_a_byte_order_mark_is_not_part_of_the_first_column_or_prompt(tmp_path):
    # as spreadsheet programs write them
    (tmp_path / "prompts.csv").write_text("prompt,id\na cat,1\n", encoding="utf-8-sig")
    (tmp_path / "prompts.txt").write_text("a cat\n", encoding="utf-8-sig")
    assert load_prompts(str(tmp_path / "prompts.csv")) == [Prompt("a cat", {"id": "1"})]
    assert load_prompts(str(tmp_path / "prompts.txt")) == [Prompt("a cat")]


def test_shipped_sets_are_read_by_name():
    sizes = {"colors": 120, "counting": 96, "green_rabbit": 1, "simple_animals": 45, "text_rendering": 60}
    assert sizes.keys() <= set(shipped_sets())
    for name in shipped_sets():
        texts = [prompt.text for prompt in load_prompts(name)]
        assert len(texts) == len(set(texts)) >= sizes.get(name, 30), name
    assert {name: len(load_prompts(name)) for name in sizes} == sizes
    assert load_prompts("simple_animals")[0] == Prompt("a cat")


def test_the_readme_of_the_sets_is_none_of_them_and_describes_each():
    assert "README" not in shipped_sets()
    readme = (Path(prompts_module.__file__).parent / "prompts" / "README.md").read_text()
    assert [name for name in shipped_sets() if f"`{name}`" not in readme] == []
    assert "CC0" in readme and "Apache-2.0" in readme


def test_counting_asks_for_one_to_four_of_each_object():
    rows = load_prompts("counting")
    assert Counter(row.columns["count"] for row in rows) == {1: 24, 2: 24, 3: 24, 4: 24}
    first_words = {1: {"a", "an"}, 2: {"two"}, 3: {"three"}, 4: {"four"}}
    for row in rows:
        number, noun = row.text.split()
        assert number in first_words[row.columns["count"]]
        assert noun.startswith(row.columns["object"])
        assert (noun == row.columns["object"]) == (row.columns["count"] == 1 or noun == "fish")


def test_colors_are_asked_for_equally_often():
    rows = load_prompts("colors")
    assert set(Counter(row.columns["color"] for row in rows).values()) == {12}
    for row in rows:
        article, color, *noun = row.text.split()
        assert (color, " ".join(noun)) == (row.columns["color"], row.columns["object"])
        assert article == ("an" if color == "orange" else "a")


def test_text_rendering_quotes_what_is_to_be_read():
    rows = load_prompts("text_rendering")
    assert [quoted(row.text) for row in rows] == [row.columns["text"] for row in rows]
    assert len({row.columns["text"] for row in rows}) == 60 and max(len(row.columns["text"]) for row in rows) <= 20


# errors


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl", "empty.csv"])
@pytest.mark.parametrize("text", ["", "\n \n"])
def test_a_file_without_prompts_is_an_error(tmp_path, name, text):
    file = write(tmp_path / name, "prompt\n" if name.endswith("csv") else text.replace(" ", "") if name.endswith("jsonl") else text)
    with pytest.raises(ValueError, match=rf"{name} holds no prompts"):
        load_prompts(file)


@pytest.mark.parametrize("row", ['{"caption": "a cat"}', '{"prompt": ""}', '{"prompt": "  "}', '{"prompt": null}'])
def test_a_row_without_a_prompt_is_named(tmp_path, row):
    file = write(tmp_path / "prompts.jsonl", f'{{"prompt": "a cat"}}\n{row}\n')
    with pytest.raises(ValueError, match=r"prompts\.jsonl, row 2: no 'prompt'.*--prompt_column"):
        load_prompts(file)


def test_a_missing_column_is_an_error_that_shows_those_there_are(tmp_path):
    file = write(tmp_path / "prompts.csv", "id,caption\n1,a cat\n")
    with pytest.raises(ValueError, match=r"row 1: no 'prompt' among its fields \['caption', 'id'\]"):
        load_prompts(file)


@pytest.mark.parametrize("row", ["{not json", '"a cat"', "[1]"])
def test_a_line_that_is_no_json_object_is_named(tmp_path, row):
    file = write(tmp_path / "prompts.jsonl", f'{{"prompt": "a cat"}}\n{row}\n')
    with pytest.raises(ValueError, match=r"prompts\.jsonl, row 2"):
        load_prompts(file)


def test_a_csv_row_with_too_many_fields_is_named(tmp_path):
    # an unquoted comma in the prompt
    file = write(tmp_path / "prompts.csv", "prompt\na cat\na dog, running\n")
    with pytest.raises(ValueError, match=r"prompts\.csv, row 2"):
        load_prompts(file)


@pytest.mark.parametrize("source", ["no_such_set", "no/such/file.txt", "mini_train.json"])
def test_an_unknown_source_is_an_error_that_lists_the_sets(source):
    with pytest.raises(ValueError, match=rf"No prompt file '{source}'.*mini_heldout, mini_train, simple_animals"):
        load_prompts(source)


def test_another_suffix_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"prompts\.parquet is not a \.txt, \.jsonl or \.csv file"):
        load_prompts(write(tmp_path / "prompts.parquet", "a cat"))


# the prompts of an epoch


@pytest.mark.parametrize(("length", "number"), [(10, 4), (7, 7), (5, 12), (3, 1), (1, 4)])
def test_prompts_are_seen_equally_often(length, number):
    prompts, seen = [Prompt(str(i)) for i in range(length)], Counter()
    for epoch in range(30):
        chosen = prompts_of_epoch(prompts, number, 0, epoch)
        assert len(chosen) == number
        seen.update(chosen)
        counts = [seen[i] for i in range(length)]
        assert max(counts) - min(counts) <= 1
    # after a whole number of cycles: exactly equally
    assert len(set(Counter(i for e in range(length) for i in prompts_of_epoch(prompts, number, 0, e)).values())) == 1


def test_an_epoch_within_one_cycle_repeats_no_prompt():
    prompts = [Prompt(str(i)) for i in range(12)]
    for epoch in range(20):
        assert len(set(prompts_of_epoch(prompts, 4, 0, epoch))) == 4


def test_an_epochs_prompts_depend_on_neither_history_nor_global_randomness():
    prompts = [Prompt(str(i)) for i in range(10)]
    forwards = [prompts_of_epoch(prompts, 4, 0, epoch) for epoch in range(8)]
    random.seed(1)
    backwards = [prompts_of_epoch(prompts, 4, 0, epoch) for epoch in reversed(range(8))]
    assert forwards == backwards[::-1]
    assert prompts == [Prompt(str(i)) for i in range(10)]


def test_an_epochs_prompts_are_the_same_in_every_version():
    # A resumed run must go on with the prompts it would have had.
    assert [prompts_of_epoch([Prompt(str(i)) for i in range(6)], 4, 42, epoch) for epoch in range(3)] == [[2, 3, 0, 1], [5, 4, 4, 2], [3, 1, 5, 0]]


def test_seeds_and_cycles_differ():
    prompts = [Prompt(str(i)) for i in range(20)]
    orders = {tuple(prompts_of_epoch(prompts, 20, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


# the mini sets


def mini(name):
    return [prompt.text for prompt in load_prompts(name)]


@pytest.mark.parametrize("name", ["mini_train", "mini_heldout"])
def test_a_mini_prompt_parses_to_exactly_what_it_says(name):
    for text in mini(name):
        asked = parse(text)
        named = frozenset({"color", "position"} & asked.keys())
        assert Scene(asked["object"], asked["count"], asked.get("color"), asked.get("position"), named).caption() == text


def test_no_held_out_object_occurs_in_training():
    train, held_out = ({parse(text)["object"] for text in mini(name)} for name in ("mini_train", "mini_heldout"))
    assert not train & held_out
    assert train | held_out == set(OBJECTS)


def test_the_mini_sets_ask_for_every_attribute():
    for name in ("mini_train", "mini_heldout"):
        asked = [parse(text) for text in mini(name)]
        assert {a["count"] for a in asked} == {1, 2, 3}
        assert len({a["color"] for a in asked if "color" in a}) >= 8
        assert {a["position"] for a in asked if "position" in a} == {"left", "right", "top", "bottom"}


def texts(path, said=None):
    return [prompt.text for prompt in load_prompts(str(path), say=(said if said is not None else []).append)]


def written(folder, name, data):
    (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder / name


@pytest.mark.parametrize("value", ['["a", "b"]', "7", "7.5", "true", '{"a": 1}'])
def test_a_prompt_that_is_no_text_is_a_bad_row_with_its_line(tmp_path, value):
    file = written(tmp_path, "p.jsonl", f'{{"prompt": "a cat"}}\n\n{{"prompt": {value}}}\n')
    with pytest.raises(ValueError, match=r"p\.jsonl, row 2: the prompt is no text: .*\(line 3\)"):
        load_prompts(str(file))


def test_folders_and_addresses_are_no_prompt_files(tmp_path):
    written(tmp_path, "mine.jsonl", '{"prompt": "a"}')
    with pytest.raises(ValueError, match=r"are a folder: name a .txt, .jsonl or .csv file.*such as mine\.jsonl"):
        load_prompts(str(tmp_path))
    with pytest.raises(ValueError, match="are a URL: download"):
        load_prompts("https://example.com/prompts.txt")
    with pytest.raises(ValueError, match="Did you mean 'simple_animals'"):
        load_prompts("simple_animal")


def test_repeated_blank_marked_and_huge_prompts_are_said_and_kept(tmp_path):
    said = []
    assert texts(written(tmp_path, "p.txt", "a cat\n\na cat\n# animals\n" + "x" * 6000), said) == ["a cat", "a cat", "# animals", "x" * 6000]
    assert [note.partition(": ")[2] for note in said] == [
        "1 blank lines between the prompts are left out.",
        "1 prompts stand there more than once, the first is 'a cat'. Each is sampled as often as it stands there.",
        "1 prompts begin as comments do, and are prompts like all others: '# animals'.",
        f"1 prompts have more than 5000 characters, of which text encoders read the first few hundred words: {'x' * 40!r}....",
    ]
    assert not (said := []) and texts(written(tmp_path, "p.jsonl", '{"prompt": "a", "n": 1}\n{"prompt": "a", "n": 2}'), said) and said == []


@pytest.mark.parametrize("name", ["images", "prompts", "self"])
def test_columns_named_as_arguments_of_rewards_are_said_and_stay_out(tmp_path, name):
    with open(tmp_path / "p.csv", "w", newline="") as file:
        csv.writer(file).writerows([["prompt", name, "other"], ["a cat", "1", "2"]])
    said = []
    (prompt,) = load_prompts(str(tmp_path / "p.csv"), say=said.append)
    assert prompt.columns == {"other": "2"} and said == [
        f"{tmp_path / 'p.csv'}: the column {name!r} is not handed to rewards, which have an argument of that name. Rename it if a reward needs it."
    ]
    import torch

    assert score(lambda images, prompts, other: torch.ones(1), torch.zeros(1, 3, 2, 2), [prompt.text], **prompt.columns)["reward"] == 1
