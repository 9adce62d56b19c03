"""The colour of the background as a reward."""

import torch

from diffusers_align.rewards import load_reward


def test_background_color_is_minus_the_distance_of_the_border():
    from diffusers_align.embedded.scenes import COLORS

    blue = torch.tensor(COLORS["blue"]).view(3, 1, 1) / 255
    images = torch.stack([blue.expand(3, 32, 32), (blue + 0.1).expand(3, 32, 32), blue.expand(3, 32, 32)]).clone()
    images[:, :, 8:24, 8:24] = 0.3  # the inside does not count
    reward = load_reward("background_color")
    expected = torch.tensor([0.0, -0.1, torch.nan])
    torch.testing.assert_close(reward(images, ["a fox", "a fox on a blue background", "a fox"], background=["blue", None, None]), expected, equal_nan=True)
    images.requires_grad_()
    reward(images[1:2], ["a fox on a blue background"]).sum().backward()
    assert float(images.grad[1].abs().sum()) > 0 and float(images.grad[1, :, 8:24, 8:24].abs().sum()) == 0
