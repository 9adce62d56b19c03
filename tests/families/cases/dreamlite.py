"""DreamLite and its few-step model for telephones: a small UNet, one prompt a call."""

from __future__ import annotations

import diffusers
import transformers

from ..case import Case
from ..parts import LATENT_CHANNELS, SMALL, TEXT_WIDTH, pil_pictures, quiet, seeded, shifted_flow
from ..vision_language import qwen3_vl, vision_processor, vision_tokenizer


def _dreamlite(cls: type):
    unet = seeded(
        diffusers.DreamLiteUNetModel, sample_size=8, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, block_out_channels=(8, 16),
        down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"), cross_attention_dim=TEXT_WIDTH,
        up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"), attention_head_dim=4, layers_per_block=1, norm_num_groups=2,
        transformer_layers_per_block=1,
    )  # fmt: skip
    vae = seeded(
        diffusers.AutoencoderTiny, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
        latent_channels=LATENT_CHANNELS,
    )  # fmt: skip
    text = {"tokenizer": vision_tokenizer(), "text_encoder": qwen3_vl(), "processor": vision_processor(transformers.Qwen3VLProcessor)}
    return quiet(cls(unet=unet, vae=vae, scheduler=shifted_flow(), **text))


FEW = {name: value for name, value in SMALL.items() if name != "guidance_scale"}
PICTURE = {"image": pil_pictures()[0]}

CASES: dict[str, list[Case]] = {
    "DreamLitePipeline": [
        Case(lambda: _dreamlite(diffusers.DreamLitePipeline), {**SMALL, "negative_prompt": "blurry"}, one_sample=True),
        Case(lambda: _dreamlite(diffusers.DreamLitePipeline), {**SMALL, **PICTURE, "negative_prompt": "blurry"}, one_sample=True, variant="edit"),
    ],
    "DreamLiteMobilePipeline": [
        Case(lambda: _dreamlite(diffusers.DreamLiteMobilePipeline), FEW, one_sample=True),
        Case(lambda: _dreamlite(diffusers.DreamLiteMobilePipeline), {**FEW, **PICTURE}, one_sample=True, variant="edit"),
    ],
}

ABSENT: dict[str, str] = {}
