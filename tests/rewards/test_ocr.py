"""OCR: is the text in the image that the prompt quotes?"""

import math
import sys

import pytest
import torch

from diffusers_align.rewards import load_reward, score
from diffusers_align.rewards.ocr import OCRScore, edit_distance, quoted, text_score


@pytest.mark.parametrize("a, b, distance", [("", "", 0), ("abc", "", 3), ("", "ab", 2), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("same", "same", 0)])
def test_edit_distance(a, b, distance):
    assert edit_distance(a, b) == edit_distance(b, a) == distance


@pytest.mark.parametrize(
    "recognised, wanted, expected",
    [
        ("Hello World", "hello world", 1.0),
        ("big HELLO\nWORLD sign", "Hello World", 1.0),  # contained, without case and space
        ("Helo", "Hello", 0.8),
        ("Jelo Wrld", "Hello World", 0.7),
        ("", "Hello", 0.0),
        ("something quite different", "Yo", 0.0),  # never below 0
        ("anything", " ", math.nan),
    ],
)
def test_text_score(recognised, wanted, expected):
    assert text_score(recognised, wanted) == pytest.approx(expected, nan_ok=True)


def test_the_wanted_text_is_the_column_or_what_the_prompt_quotes():
    assert quoted('a sign that says "New York" and "Jazz"') == "New York" and quoted("a sign \u201cJazz\u201d") == "Jazz" and quoted("a cat") is None
    seen = []

    def reader(picture):
        seen.append(picture.getpixel((0, 0)))
        return "jazz"

    images = torch.rand(4, 3, 16, 16)
    prompts = ['a sign "Jazz"', 'a sign "Jazz"', "a cat", 'a "Jaz"']
    result = score(OCRScore(reader), images, prompts, on_invalid="mask", text=[None, "blue", None, ""])["reward"]
    assert result.tolist() == pytest.approx([1.0, 0.0, math.nan, 1.0], nan_ok=True)
    assert seen == [tuple((images[i, :, 0, 0] * 255).round().int().tolist()) for i in (0, 1, 3)]
    images[0, 0, 0, 0] = torch.nan
    assert OCRScore(reader)(images, prompts).isnan().tolist() == [True, False, True, False]


def test_ocr_of_videos_is_the_mean_over_frames():
    reward = OCRScore(lambda picture: "jazz" if picture.getpixel((0, 0))[0] > 127 else "")
    videos = torch.zeros(2, 4, 3, 8, 8)
    videos[0, 0], videos[1, 1:] = 1, 1
    assert reward(videos, ['a "jazz"', 'a "jazz"']).tolist() == [0.25, 0.75]


def test_ocr_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(ImportError, match="pip install rapidocr onnxruntime"):
        load_reward("ocr")
