"""What mini-sd gets so that it may learn sides: one level more in its UNet, and a text encoder that tells them apart.

The shipped mini-sd (two levels, text encoder trained along) draws objects at random places. Its text encoder has become deaf: encodings of
"on the left" and "on the right" differ by a twentieth of those of two objects, so the UNet has nothing to learn from, and the encoder
is told nothing because the UNet does not listen. And its lowest level, 8 x 8, shows a place only through the zeros at its rim. With both
mended, and scenes with a side alone for a start, it reads sides among all scenes too (the models' card has the figures).
"""

from __future__ import annotations

import copy

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from ..scenes import POSITIONS

LOUDNESS = 6.0


def grown(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The UNet with one level more below, as wide as its lowest; all weights that it had are where they were, the new level's are new."""
    config, levels = dict(unet.config), len(unet.config.block_out_channels)
    config["block_out_channels"] = (*unet.config.block_out_channels, unet.config.block_out_channels[-1])
    config["down_block_types"] = (*unet.config.down_block_types, unet.config.down_block_types[-1])
    config["up_block_types"] = (unet.config.up_block_types[0], *unet.config.up_block_types)
    larger = UNet2DConditionModel.from_config(config)
    state = larger.state_dict()
    for name, value in unet.state_dict().items():
        for level in range(levels):
            if name.startswith(f"up_blocks.{level}."):
                name = name.replace(f"up_blocks.{level}.", f"up_blocks.{level + 1}.", 1)
                break
        state[name] = value
    larger.load_state_dict(state)
    return larger


def said_sides(tokenizer: CLIPTokenizer, ids: Tensor) -> Tensor:
    """(B, L) number of the side that the caption has named up to each token, -1 before."""
    said = torch.full_like(ids, -1)
    for number, phrase in enumerate(POSITIONS.values()):
        named = (ids == tokenizer(phrase).input_ids[-2]).cumsum(1) > 0
        said = torch.where(named, number, said)
    return said


def tell_sides_apart(encoder: CLIPTextModel, tokenizer: CLIPTokenizer, ids: Tensor, updates: int = 300) -> float:
    """Teach a text encoder to add one of four orthogonal vectors of length 6 from the word that names a side on.

    ids: (N, L) captions to teach with. All other that it says is to stay as it was. Returns the squared error that is left, as a share of
    the first.
    """
    before = copy.deepcopy(encoder)
    width = encoder.config.hidden_size
    codes = LOUDNESS * torch.linalg.qr(torch.randn(width, len(POSITIONS), generator=torch.Generator().manual_seed(3)))[0].T
    optimizer, losses = torch.optim.AdamW(encoder.parameters(), 2e-3), []
    for update in range(updates):
        part = ids[torch.randint(0, len(ids), (96,))]
        said = said_sides(tokenizer, part)
        with torch.no_grad():
            target = before(part)[0] + torch.where(said[..., None] >= 0, codes[said.clamp(min=0)], 0.0)
        loss = nn.functional.mse_loss(encoder(part)[0], target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - update / updates)
        optimizer.step()
        losses.append(loss.item())
    return losses[-1] / losses[0]
