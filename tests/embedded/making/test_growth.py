"""A UNet that grows, and a text encoder that learns to name sides."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel

from diffusers_align.embedded.making.growth import grown, said_sides, tell_sides_apart
from diffusers_align.embedded.scenes import POSITIONS
from diffusers_align.embedded.teaching import build_tokenizer, text_config, tokenize


def small_unet(channels=(16, 32)):
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=channels, layers_per_block=1, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=16, attention_head_dim=4, norm_num_groups=8,
    )  # fmt: skip


def test_a_grown_unet_has_a_level_more_and_all_its_old_weights():
    torch.manual_seed(0)
    unet = small_unet()
    larger = grown(unet)
    assert larger.config.block_out_channels == (16, 32, 32)
    assert larger.config.up_block_types == ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    state = larger.state_dict()
    for name, value in unet.state_dict().items():
        new = name.replace("up_blocks.1.", "up_blocks.2.").replace("up_blocks.0.", "up_blocks.1.")
        assert torch.equal(state[new], value), new
    assert sum(p.numel() for p in larger.parameters()) > sum(p.numel() for p in unet.parameters())
    x = torch.randn(2, 4, 8, 8)
    out = larger(x, torch.tensor([1, 5]), torch.randn(2, 16, 16)).sample
    assert out.shape == x.shape and out.isfinite().all()


def test_a_side_is_said_from_its_word_on():
    tokenizer = build_tokenizer()
    ids = tokenize(tokenizer, ["a fox on the left on a red background", "a fox", "a cat at the bottom"])
    said = said_sides(tokenizer, ids)
    assert said[0].tolist() == [-1] * 5 + [0] * 11
    assert said[1].tolist() == [-1] * 16
    assert said[2].tolist() == [-1] * 5 + [3] * 11


@pytest.mark.slow
def test_a_deaf_encoder_learns_to_tell_sides_apart_and_keeps_the_rest():
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    encoder = CLIPTextModel(text_config(tokenizer, 32, 1))
    captions = [f"a {name}{side}" for name in ("fox", "cat", "bus", "star") for side in ["", *(f" {phrase}" for phrase in POSITIONS.values())]]
    ids = tokenize(tokenizer, captions)
    with torch.no_grad():
        left, right, none = (encoder(tokenize(tokenizer, [text]))[0] for text in ("a fox on the left", "a fox on the right", "a fox"))
    share = tell_sides_apart(encoder, tokenizer, ids, updates=150)
    with torch.no_grad():
        new_left, new_right, new_none = (encoder(tokenize(tokenizer, [text]))[0] for text in ("a fox on the left", "a fox on the right", "a fox"))
    assert share < 0.3, share
    assert (new_left - new_right).norm() > 2 * (left - right).norm()
    assert (new_none - none).norm() < 0.3 * (new_left - left).norm()
