"""Images as tensors, their crops and flips."""

import pytest
import torch
from PIL import Image
from preference_rows import RED

from diffusers_align.data.augment import Augmentation, draw_augmentations, to_tensor


def gradient(width, height):
    """Red rises from left to right, green from top to bottom."""
    x, y = torch.arange(width) / (width - 1), torch.arange(height) / (height - 1)
    pixels = torch.stack([x.expand(height, width), y[:, None].expand(height, width), torch.zeros(height, width)], -1)
    return Image.fromarray((pixels * 255).byte().numpy())


def test_tensors_have_their_size_and_range():
    tensor = to_tensor(gradient(40, 20), 16, 24)
    assert tensor.shape == (3, 16, 24) and tensor.dtype == torch.float32 and 0 <= tensor.min() < 0.2 < 0.7 < tensor.max() <= 1
    assert torch.equal(to_tensor(Image.new("RGB", (8, 8), RED), 8, 8), torch.tensor([1.0, 0, 0])[:, None, None].expand(3, 8, 8))


def test_crops_keep_the_aspect_and_lie_where_they_should():
    left, centre, right = (to_tensor(gradient(200, 100), 50, 50, Augmentation(left=x)) for x in (0.0, 0.5, 1.0))
    for crop, (low, high) in ((left, (0, 0.5)), (centre, (0.25, 0.75)), (right, (0.5, 1))):
        assert crop[0, 0, 0] == pytest.approx(low, abs=0.02) and crop[0, 0, -1] == pytest.approx(high, abs=0.02)
        assert crop[1, 0, 0] == pytest.approx(0, abs=0.02) and crop[1, -1, 0] == pytest.approx(1, abs=0.02)
    assert torch.equal(to_tensor(gradient(200, 100), 50, 50, Augmentation(flip=True)), centre.flip(-1))


def test_a_pair_is_cropped_and_flipped_alike_whatever_its_sizes():
    one, two = draw_augmentations(2, seed=0, epoch=3, row=7, random_crop=True, random_flip=True)
    assert one == two
    small, large = to_tensor(gradient(120, 60), 32, 32, one), to_tensor(gradient(480, 240), 32, 32, two)
    assert (small - large).abs().max() < 0.04


def test_augmentations_depend_on_seed_epoch_and_row_alone():
    def draw(**change):
        return draw_augmentations(2, **{"seed": 0, "epoch": 0, "row": 0, "random_crop": True, "random_flip": True} | change)

    assert draw() == draw() and len({draw(**{name: 1})[0].key for name in ("seed", "epoch", "row")} | {draw()[0].key}) == 4
    independent = draw(independent=True)
    assert independent[0] == draw()[0] != independent[1]
    assert draw(random_crop=False, random_flip=False) == [Augmentation()] * 2
    flips = [draw(row=row)[0].flip for row in range(400)]
    assert 150 < sum(flips) < 250
