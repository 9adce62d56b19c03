"""Files as people have them: read rightly, or refused with the file, the line and what to do."""

import json

import pytest

from diffusers_align.data import load_prompts


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


@pytest.mark.parametrize("name, content, message", [
    ("p.jsonl", '{"prompt": "a"}\n{"prompt": null}', r"row 2: no 'prompt', the field is empty.*\(line 2\)"),
    ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": "b",}', r"row 2: not a row of named fields: '{\"prompt\".*at column \d+\) \(line 3\)"),
    ("p.jsonl", '{"prompt": "a", "prompt": "b"}', "row 1: the field 'prompt' stands twice"),
    ("p.jsonl", '{"prompt": "a \\ud83d cat"}', "row 1: the prompt holds half of a surrogate pair"),
    ("p.jsonl", "[" * 100_000, "row 1: not a row of named fields"),
    ("p.json", '["a cat"]', "row 1: not a row of named fields: 'a cat'. A row is an object with a field 'prompt'; texts alone go into a .txt file"),
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
