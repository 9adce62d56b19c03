"""Other captions of a group's images: from files and functions, and the log-probabilities under them."""

import pytest

from diffusers_align.training.online.captions import load_views


def written(folder, name, data):
    (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder / name


def test_views_files_are_read_by_the_same_rules(tmp_path):
    from diffusers_align.data import Prompt

    file = written(tmp_path, "v.jsonl", '{"prompt": "a\u2028b", "captions": ["c", "d"]}\n')
    assert load_views(str(file), [Prompt("a\u2028b")], 2)("a\u2028b", None) == ["c", "d"]
    with pytest.raises(ValueError, match=r"v\.jsonl, line 1: no object with the fields"):
        load_views(str(written(tmp_path, "v.jsonl", '{"prompt": "a"}\n')), [Prompt("a")], 2)
