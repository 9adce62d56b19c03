"""Prompt files as people have them: read rightly, or refused with the file, the line and what to do."""

import csv
import json

import pytest

from diffusers_align.data import load_preferences, load_prompts
from diffusers_align.rewards import score
from diffusers_align.training.online.captions import load_views


def texts(path, said=None):
    return [prompt.text for prompt in load_prompts(str(path), say=(said if said is not None else []).append)]


def written(folder, name, data):
    (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder / name


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r"], ids=ascii)
def test_only_line_feeds_end_a_line(tmp_path, mark):
    prompt = f"a cat{mark}on a mat"
    assert texts(written(tmp_path, "p.txt", f"{prompt}\r\na dog\n")) == [prompt, "a dog"]
    rows = json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n" + '{"prompt": "a dog"}'
    assert texts(written(tmp_path, "p.jsonl", rows)) == [prompt, "a dog"]
    assert texts(written(tmp_path, "p.csv", f'prompt\n"{prompt}"\na dog\n')) == [prompt, "a dog"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize(
    "name, content", [("p.txt", "un café\na cat"), ("p.csv", "prompt\nun café\na cat"), ("p.jsonl", '{"prompt": "un café"}\n{"prompt": "a cat"}')]
)
def test_encodings_that_say_what_they_are(tmp_path, encoding, name, content):
    assert texts(written(tmp_path, name, content.encode(encoding))) == ["un café", "a cat"]


@pytest.mark.parametrize("name", ["p.txt", "p.csv", "p.jsonl", "p.json", "p.tsv"])
def test_other_encodings_and_binary_files_are_named(tmp_path, name):
    with pytest.raises(ValueError, match=rf"{name} is not in UTF-8 \(line 2: byte \d+, 0xe9.*iconv -f latin1 -t utf-8 {name}"):
        load_prompts(str(written(tmp_path, name, "prompt\nun café\n".encode("latin-1"))))
    with pytest.raises(ValueError, match=f"{name} is no text: byte 9 is zero"):
        load_prompts(str(written(tmp_path, name, b"\x89PNG\r\n\x1a\n\0\0")))


@pytest.mark.parametrize("name, content", [
    ("P.TXT", "a cat\na dog"), ("p.JSONL", '{"prompt": "a cat"}\n{"prompt": "a dog"}'), ("p.json", '[{"prompt": "a cat"}, {"prompt": "a dog"}]'),
    ("p.tsv", "prompt\ttag\na cat\t1\na dog\t2\n"), ("p.Csv", "tag,prompt\n1,a cat\n2,a dog\n"),
])  # fmt: skip
def test_suffixes_are_read_in_either_case(tmp_path, name, content):
    assert texts(written(tmp_path, name, content)) == ["a cat", "a dog"]


@pytest.mark.parametrize("value", ['["a", "b"]', "7", "7.5", "true", '{"a": 1}'])
def test_a_prompt_that_is_no_text_is_a_bad_row_with_its_line(tmp_path, value):
    file = written(tmp_path, "p.jsonl", f'{{"prompt": "a cat"}}\n\n{{"prompt": {value}}}\n')
    with pytest.raises(ValueError, match=r"p\.jsonl, row 2: the prompt is no text: .*\(line 3\)"):
        load_prompts(str(file))


@pytest.mark.parametrize("name, content, message", [
    ("p.jsonl", '{"prompt": "a"}\n{"prompt": null}', r"row 2: no 'prompt', the field is empty.*\(line 2\)"),
    ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": "b",}', r"row 2: not a row of named fields: '{\"prompt\".*at column \d+\) \(line 3\)"),
    ("p.jsonl", '{"prompt": "a", "prompt": "b"}', "row 1: the field 'prompt' stands twice"),
    ("p.jsonl", '{"prompt": "a \\ud83d cat"}', "row 1: the prompt holds half of a surrogate pair"),
    ("p.jsonl", "[" * 100_000, "row 1: not a row of named fields"),
    ("p.json", '["a cat"]', "row 1: not a row of named fields: 'a cat'"),
    ("p.json", '{"prompt": "a"}\n{"prompt": "b"}', r"is not valid JSON .*line 2.*call it \.jsonl"),
    ("p.csv", "prompt,tag\na cat,1\na dog, running,2\n", r"row 2: more fields than columns: \['2'\].*\(line 3\)"),
    ("p.csv", 'prompt,tag\n"a\ncat",1\na dog\n', r"row 2: fewer fields than columns: no 'tag'.*\(line 4\)"),
    ("p.csv", 'prompt,tag\na cat,1\n"a dog,2\na fox,3\n', "cannot be read as CSV .*begins in line 3.*quotation marks"),
    ("p.csv", "prompt;tag\na cat;1\n", "separated by commas, not by ';'"),
    ("p.tsv", "prompt,tag\na cat,1\n", "separated by tabs, not by ','"),
    ("p.csv", "prompt,prompt\na,b\n", "names the column 'prompt' twice"),
    ("p.csv", "caption,tag\na cat,1\n", r"no 'prompt' among its fields \['caption', 'tag'\].*--prompt_column"),
    ("p.csv", f"prompt\n{'x' * 200_000}\n", r"cannot be read as CSV \(field larger than"),
])  # fmt: skip
def test_broken_files_are_told_with_what_to_do(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=rf"{name}.*{message}"):
        load_prompts(str(written(tmp_path, name, content)))


def test_folders_and_addresses_are_no_prompt_files(tmp_path):
    written(tmp_path, "mine.jsonl", '{"prompt": "a"}')
    with pytest.raises(ValueError, match=r"are a folder: name a .txt, .jsonl or .csv file.*such as mine\.jsonl"):
        load_prompts(str(tmp_path))
    with pytest.raises(ValueError, match="are a URL: download"):
        load_prompts("https://example.com/prompts.txt")
    with pytest.raises(ValueError, match="Did you mean 'simple_animals'"):
        load_prompts("simple_animal")


def test_repeated_blank_and_huge_prompts_are_said_and_kept(tmp_path):
    said = []
    assert texts(written(tmp_path, "p.txt", "a cat\n\na cat\n" + "x" * 6000), said) == ["a cat", "a cat", "x" * 6000]
    assert [note.partition(": ")[2] for note in said] == [
        "1 blank lines between the prompts are left out.",
        "1 prompts stand there more than once, the first is 'a cat'. Each is sampled as often as it stands there.",
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


def test_preferences_are_read_as_strictly(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "image": "x.png"}\n\n{"prompt": "b", "image": 3,}\n')
    with pytest.raises(ValueError, match="No rows are left") as error:
        load_preferences(str(tmp_path / "p.jsonl"), "captioned")
    assert "row 1: image: no file" in str(error.value) and "(line 3)" in str(error.value)


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


def test_views_files_are_read_by_the_same_rules(tmp_path):
    from diffusers_align.data import Prompt

    file = written(tmp_path, "v.jsonl", '{"prompt": "a\u2028b", "captions": ["c", "d"]}\n')
    assert load_views(str(file), [Prompt("a\u2028b")], 2)("a\u2028b", None) == ["c", "d"]
    with pytest.raises(ValueError, match=r"v\.jsonl, line 1: no object with the fields"):
        load_views(str(written(tmp_path, "v.jsonl", '{"prompt": "a"}\n')), [Prompt("a")], 2)
