"""Images to tensors: resize, crop and flip, the same for both images of a pair."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .images import covered


@dataclass(frozen=True)
class Augmentation:
    """Where to crop, as a fraction of what there is to choose (0.5: the centre), and whether to mirror."""

    top: float = 0.5
    left: float = 0.5
    flip: bool = False

    @property
    def key(self) -> str:
        """Its part of a cache's key."""
        return f"{self.top!r}/{self.left!r}/{self.flip}"


def draw_augmentations(
    number: int, *, seed: int, epoch: int, row: int, random_crop: bool = False, random_flip: bool = False, independent: bool = False
) -> list[Augmentation]:
    """The augmentations of the `number` images of a row: one for all, so that a pair differs by its content alone.

    `independent=True` draws one for each image, as the official Diffusion-DPO code does. A function of its arguments alone.
    """
    drawn = []
    for image in range(number):
        draw = random.Random(f"{seed}/{epoch}/{row}/{image if independent else 0}")
        top, left, coin = draw.random(), draw.random(), draw.random()
        drawn.append(Augmentation(top if random_crop else 0.5, left if random_crop else 0.5, random_flip and coin < 0.5))
    return drawn


def to_tensor(image: Image.Image, height: int, width: int, augmentation: Augmentation = Augmentation()) -> Tensor:
    """(3, height, width) float32 in [0, 1]: the image, resized to cover that size (Lanczos, aspect kept), cropped and mirrored.

    The crop is a fraction of the overhang, so images of different sizes are cropped at corresponding places.
    """
    image = covered(image.convert("RGB"), height, width, augmentation.top, augmentation.left)
    if augmentation.flip:
        image = ImageOps.mirror(image)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
