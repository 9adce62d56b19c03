"""Sound for people, by its content: bright rows where the tones are, and files that hold the values."""

import json
import math
import wave

import numpy as np
import pytest
import torch

from diffusers_align.training.online.sampling import Evaluation
from diffusers_align.training.report.pictures import grid, to_pil
from diffusers_align.training.report.sounds import COLUMNS, ROWS, captions_of, noun, sounds_of, spectrogram, write_sounds, write_wav

RATE = 16000


def sine(frequency, seconds=1.0, amplitude=1.0):
    return amplitude * torch.sin(2 * math.pi * frequency * torch.arange(int(seconds * RATE)) / RATE)


def brightness(picture):
    return picture.mean(0)


def row_of(frequency):
    """Counted from the top, which is half the sampling rate."""
    return (1 - frequency / (RATE / 2)) * ROWS


@pytest.mark.parametrize("frequency", [500, 2000, 6000])
def test_a_sine_is_a_bright_row_at_its_frequency(frequency):
    picture = spectrogram(sine(frequency)[None])
    assert picture.shape == (3, ROWS, COLUMNS)
    rows = brightness(picture)[:, COLUMNS // 4 : -COLUMNS // 4].mean(1)
    assert abs(int(rows.argmax()) + 0.5 - row_of(frequency)) <= 1.5
    assert rows.max() > 0.9 and rows.median() < 0.1, "full scale is white, the rest is dark"


def test_time_goes_to_the_right_and_louder_is_lighter():
    picture = brightness(spectrogram(torch.cat([sine(1000, 0.5), 0.01 * sine(5000, 0.5)])[None]))
    first, second = picture[:, : COLUMNS // 3].mean(1), picture[:, -COLUMNS // 3 :].mean(1)
    assert abs(int(first.argmax()) + 0.5 - row_of(1000)) <= 1.5 and abs(int(second.argmax()) + 0.5 - row_of(5000)) <= 1.5
    assert first.max() > second.max() + 0.2
    assert spectrogram(torch.zeros(1, RATE)).max() == 0


def test_a_short_click_is_not_lost_in_a_long_sound():
    sound = torch.zeros(1, 60 * RATE)
    sound[0, 30 * RATE] = 1.0
    columns = brightness(spectrogram(sound)).mean(0)
    assert abs(int(columns.argmax()) - COLUMNS // 2) <= 1 and columns.max() > 0.1 and (columns > 0.01).sum() <= 3


@pytest.mark.parametrize("length", [1, 2, 7, 100, 511, 513])
def test_short_sounds_have_a_picture(length):
    picture = spectrogram(torch.ones(2, length))
    assert picture.shape == (3, ROWS, COLUMNS) and picture.isfinite().all() and picture.max() > 0.2


def test_what_is_not_finite_is_shown():
    sound = sine(1000)[None].clone()
    sound[0, RATE // 2] = math.nan
    picture = to_pil(spectrogram(sound))
    assert picture.getpixel((COLUMNS // 2, 5)) == (255, 0, 255) and picture.getpixel((5, 5)) != (255, 0, 255)


def test_a_wav_file_holds_the_values(tmp_path):
    sound = torch.stack([sine(440, 0.1), 2 * sine(880, 0.1)])
    sound[0, 3] = math.nan
    write_wav(tmp_path / "x.wav", sound, RATE)
    with wave.open(str(tmp_path / "x.wav")) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate(), file.getnframes()) == (2, 2, RATE, 1600)
        values = np.frombuffer(file.readframes(1600), "<i2").reshape(-1, 2).T / 32767
    np.testing.assert_allclose(values, sound.nan_to_num(0).clamp(-1, 1).numpy(), atol=1 / 32767)


def evaluation(images, audio=(), rate=RATE):
    return Evaluation(["a bell", "a drum", "rain"], [0, 1, 2], list(images), {}, "", list(audio), rate)


def test_an_evaluations_sounds_are_files_and_captions(tmp_path):
    heard = evaluation([sine(1000)[None], sine(2000)[None]])
    write_sounds(tmp_path / "sounds", heard)
    assert sorted(path.name for path in (tmp_path / "sounds").iterdir()) == ["1.wav", "2.wav"]
    assert captions_of(heard) == ["a bell (1 s, up to 8 kHz)", "a drum (1 s, up to 8 kHz)"] and noun(heard) == "sounds"
    sheet = grid(heard.images, captions_of(heard), cell=128)
    boxes = json.loads(sheet.info["cells"])
    assert [(box[2] - box[0], box[3] - box[1]) for box in boxes] == [(COLUMNS - 4, ROWS - 2)] * 2
    assert sheet.getpixel((COLUMNS, 10)) == (255, 255, 255), "white between two"
    for box, frequency in zip(boxes, (1000, 2000)):
        rows = np.asarray(sheet.crop(box).convert("L"), float)[:, COLUMNS // 4 : -COLUMNS // 4].mean(1)
        assert abs(rows.argmax() + 0.5 - row_of(frequency)) <= 1.5


def test_the_sound_of_videos_is_written_and_pictures_have_none(tmp_path):
    seen = evaluation([torch.rand(4, 3, 8, 8)], [sine(1000)[None]])
    write_sounds(tmp_path / "videos", seen)
    assert [path.name for path in (tmp_path / "videos").iterdir()] == ["1.wav"]
    assert captions_of(seen) == ["a bell"] and noun(seen) == "images"
    silent = evaluation([torch.rand(3, 8, 8)], rate=None)
    write_sounds(tmp_path / "none", silent)
    assert sounds_of(silent) == [] and not (tmp_path / "none").exists()
