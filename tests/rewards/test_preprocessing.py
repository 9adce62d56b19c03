"""What models of images see: as transformers and the official code prepare it."""

import numpy as np
import pytest
import torch
from reward_models import bytes_of, image_processor, letterboxed, normalised, photo_like

from diffusers_align.rewards.preprocessing import Letterbox, Preprocessing


@pytest.mark.parametrize("shape", [(32, 32), (32, 45), (64, 64), (90, 51), (20, 24)])
def test_preprocessing_follows_transformers(clip_folder, shape):
    images = photo_like(2, 3, *shape)
    expected = torch.tensor(np.stack(image_processor()(bytes_of(images))["pixel_values"]))
    ours = Preprocessing.from_pretrained(clip_folder)(images)
    assert ours.shape == (2, 3, 32, 32)
    tolerance = 1e-5 if min(shape) == 32 else 0.025  # where it resizes, transformers rounds to 8 bits: half a level, in units of std
    torch.testing.assert_close(ours, expected, atol=tolerance, rtol=0)


def test_preprocessing_of_hard_edges_stays_in_range(clip_folder):
    images = photo_like(2, 3, 50, 50).round()  # black and white: bicubic interpolation overshoots
    preprocess = Preprocessing.from_pretrained(clip_folder)
    ours = preprocess(images)
    torch.testing.assert_close(ours, torch.tensor(np.stack(image_processor()(bytes_of(images))["pixel_values"])), atol=0.025, rtol=0)
    pixels = ours * torch.tensor(preprocess.std).view(3, 1, 1) + torch.tensor(preprocess.mean).view(3, 1, 1)
    assert pixels.min() > -1e-6 and pixels.max() < 1 + 1e-6


def test_preprocessing_reads_every_setting(tmp_path):
    settings = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 2}
    image_processor(16, **settings).save_pretrained(tmp_path / "a")
    assert Preprocessing.from_pretrained(str(tmp_path / "a")) == Preprocessing(16, (16, 16), (0.5,) * 3, (0.25,) * 3, "bilinear")
    image_processor(16, do_resize=False, do_center_crop=False, do_normalize=False).save_pretrained(tmp_path / "b")
    plain = Preprocessing.from_pretrained(str(tmp_path / "b"))
    images = torch.rand(1, 3, 9, 7)
    torch.testing.assert_close(plain(images), images)
    padded = Preprocessing(None, (9, 10), (0.0,) * 3, (1.0,) * 3)(images)
    assert padded.shape == (1, 3, 9, 10)
    torch.testing.assert_close(padded[..., 2:9], images)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "preprocessor_config.json").write_text('{"crop_size": 8, "size": 8}')  # as the oldest checkpoints have it
    assert Preprocessing.from_pretrained(str(tmp_path / "c")) == Preprocessing(8, (8, 8))


@pytest.mark.parametrize(
    "size, shape",
    [(32, s) for s in [(32, 32), (64, 64), (40, 60), (60, 40), (33, 100), (100, 33), (20, 13), (5, 90), (45, 32), (32, 31), (1, 64)]]
    + [(224, (300, 225)), (224, (240, 416)), (224, (304, 208)), (224, (224, 100))],
)
def test_the_letterbox_is_the_official_resize_and_pad(size, shape):
    images = torch.stack([photo_like(3, *shape, seed=seed) for seed in range(2)])
    images[1] = (images[1] > 0.5).float()  # hard edges, where bicubic overshoots
    ours = Letterbox(size)(images)
    for image, mine in zip(images, ours):
        torch.testing.assert_close(mine, letterboxed(image, size), atol=2e-4, rtol=0)  # a level of 8 bits is 0.015
    bars = normalised(torch.zeros(3, 1, 1))
    if shape[0] > shape[1] + 2:
        assert torch.equal(ours[:, :, :, :1], bars.expand(2, 3, size, 1)) and torch.equal(ours[:, :, :, -1:], bars.expand(2, 3, size, 1))


def test_odd_bars_are_wider_behind():
    ours = Letterbox(32)(torch.ones(1, 3, 64, 54)) > 0  # 27 columns of 32: 2 bars before, 3 behind
    assert ours[0, 0, 0].tolist() == [False] * 2 + [True] * 27 + [False] * 3
    assert (Letterbox(32)(torch.ones(1, 3, 10, 400)) > 0)[0, 0, :, 0].tolist() == [False] * 15 + [True] + [False] * 16
