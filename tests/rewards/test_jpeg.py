"""The size of the JPEG file as a reward."""

import io

import pytest
import torch
from PIL import Image
from reward_models import PROMPTS, bytes_of

from diffusers_align.rewards import load_reward, score
from diffusers_align.rewards.jpeg import jpeg_compressibility, jpeg_incompressibility


def test_jpeg_is_the_size_that_pil_writes_in_kb():
    images = torch.rand(2, 3, 24, 40)
    sizes = []
    for array in bytes_of(images):
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, format="JPEG", quality=95)
        sizes.append(len(buffer.getvalue()) / 1000)
    assert jpeg_incompressibility(images, PROMPTS).tolist() == pytest.approx(sizes)
    assert jpeg_compressibility(images, PROMPTS).tolist() == pytest.approx([-s for s in sizes])


def test_jpeg_prefers_flat_images_and_rounds():
    noise, flat = torch.rand(1, 3, 32, 32), torch.full((1, 3, 32, 32), 0.5)
    assert jpeg_compressibility(flat, ["x"]) > jpeg_compressibility(noise, ["x"])
    eighth = (noise * 255).round() / 255
    for shift in (-0.4 / 255, 0.4 / 255):  # truncation would change the pixels
        torch.testing.assert_close(jpeg_compressibility(eighth + shift, ["x"]), jpeg_compressibility(eighth, ["x"]))


def test_jpeg_of_videos_is_the_mean_and_a_nan_pixel_is_no_score():
    videos = torch.rand(2, 3, 3, 16, 16)
    expected = jpeg_incompressibility(videos.flatten(0, 1), ["x"] * 6).view(2, 3).mean(1)
    torch.testing.assert_close(jpeg_incompressibility(videos, PROMPTS), expected)
    images = videos[:, 0].clone()
    images[1, 0, 0, 0] = float("nan")
    assert jpeg_compressibility(images, PROMPTS).isnan().tolist() == [False, True]
    with pytest.raises(ValueError, match=r"got the shape \(2, 1, 8, 8\)"):
        jpeg_compressibility(torch.rand(2, 1, 8, 8), PROMPTS)


def test_a_column_is_no_option():
    """A prompt file may well have a column `quality`, which is nothing of a JPEG's."""
    images, reward = torch.rand(2, 3, 16, 16), load_reward("jpeg_compressibility")
    assert torch.equal(score(reward, images, ["a", "b"], quality=[1, 2])["reward"], score(reward, images, ["a", "b"])["reward"])
    coarse = load_reward("jpeg_compressibility", quality=10)
    assert (score(coarse, images, ["a", "b"], quality=[95, 95])["reward"] > score(reward, images, ["a", "b"])["reward"]).all()
