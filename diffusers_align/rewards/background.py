"""How near the background is to a wanted colour: a dense reward for a preference that prompts need not state.

The background is what lies along the image's border, two pixels wide at 32 px. The reward is minus the mean absolute difference
to the colour, 0 at best. It is easy to hack (by drawing the object small), so look at another reward beside it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .preprocessing import flatten_frames, mean_over_frames, repeat_for_frames


def background_color(images: Tensor, prompts: list[str], **columns: Any) -> Tensor:
    """(B,) in [-1, 0] for images (B, 3, H, W) or (B, F, 3, H, W) in [0, 1]; NaN where no known colour is wanted. Differentiable.

    The colour is the column `background` (a name of `embedded.scenes.COLORS`), or the one that the prompt names.
    """
    from ..embedded.scenes import COLORS, parse

    names = [name or parse(prompt).get("color") for name, prompt in zip(columns.get("background") or [None] * len(prompts), prompts)]
    wanted = torch.tensor([COLORS.get(name, (torch.nan,) * 3) for name in names], device=images.device) / 255
    frames = flatten_frames(images)
    width = max(1, frames.shape[-1] // 16)
    sides = (frames[..., :width, :], frames[..., -width:, :], frames[..., :width], frames[..., -width:])
    border = torch.cat([side.flatten(2) for side in sides], -1)
    distance = (border - repeat_for_frames(wanted, images)[..., None]).abs().mean((1, 2))
    return -mean_over_frames(distance, images)


background_color.scores_only = "prompts that name a colour that it knows, or rows with one in a column `background`: red, blue ... (`embedded.scenes.COLORS`)"
