"""Words in pictures: wrapped, cut, and of characters that a font has."""

import json

import pytest
import torch
from PIL import Image

from diffusers_align.training.report import lettering
from diffusers_align.training.report.lettering import ELLIPSIS, font_of, readable, width_of, wrapped
from diffusers_align.training.report.pictures import grid, save


def shades(number, size=(8, 8), start=10):
    """Images of one colour each, no two alike and none white."""
    return [torch.full((3, *size), (start + i) / 255) for i in range(number)]


# --- captions --------------------------------------------------------------------------------------------------------------


def test_captions_are_wrapped_between_words_and_lose_nothing():
    text = "a panda on a blue background beside two lemons"
    lines = wrapped(text, 90, most=10)
    assert len(lines) > 1 and " ".join(lines) == text and all(width_of(line) <= 90 for line in lines)


def test_captions_that_are_too_long_end_in_an_ellipsis_and_stand_whole_in_the_file(tmp_path):
    text = "word " * 60
    lines = wrapped(text, 90, most=3)
    assert len(lines) == 3 and lines[-1].endswith(ELLIPSIS) and width_of(lines[-1]) <= 90
    save(grid(shades(1), [text], cell=94), tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as picture:
        assert json.loads(picture.info["captions"]) == [text] and len(json.loads(picture.info["cells"])) == 1


def test_a_word_wider_than_its_cell_is_broken():
    lines = wrapped("x" * 50, 60, most=10)
    assert "".join(lines) == "x" * 50 and all(width_of(line) <= 60 for line in lines)


@pytest.mark.parametrize("text, shown", [("a\nb\tc", "a b c"), ("", ""), ("Æß Ω Ж", "Æß Ω Ж"), ("zero\u200bwidth", "zerowidth")])
def test_what_can_be_drawn_stays(text, shown):
    assert readable(text) == shown


def test_what_no_font_has_is_spelled_out(monkeypatch):
    monkeypatch.setattr(lettering, "_system_fonts", lambda: ())
    font_of.cache_clear()
    try:
        assert readable("猫 in a hat") == "U+732B in a hat" and readable("a 🦊\ufe0f!") == "a :fox face: !"
        assert "U+732B" in wrapped("猫" * 3, 200, most=4)[0]
    finally:
        font_of.cache_clear()
