"""LongCat-Image and its edits: sixteen latent channels whatever the autoencoder, prompts padded to 512 tokens."""

from __future__ import annotations

import diffusers

from ..case import Case
from ..parts import SMALL, TEXT_WIDTH, image_vae, pil_pictures, quiet, seeded, shifted_flow
from ..vision_language import qwen2_5_vl, vision_processor, vision_tokenizer

CHANNELS = 16
# An edit is of a megapixel: an autoencoder that halves it six times leaves 8 x 8 tokens.
DEEP = {"levels": 7, "block_out_channels": [2] * 7, "layers_per_block": 1}


def _longcat(cls: type, **vae):
    transformer = seeded(
        diffusers.LongCatImageTransformer2DModel, in_channels=4 * CHANNELS, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH, pooled_projection_dim=TEXT_WIDTH, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    parts = {"tokenizer": vision_tokenizer(), "text_encoder": qwen2_5_vl(), "text_processor": vision_processor()}
    vae = image_vae(latent_channels=CHANNELS, scaling_factor=0.3611, shift_factor=0.1159, **vae)
    return quiet(cls(transformer=transformer, vae=vae, scheduler=shifted_flow(use_dynamic_shifting=True), **parts))


CASES: dict[str, list[Case]] = {
    "LongCatImagePipeline": [
        Case(lambda: _longcat(diffusers.LongCatImagePipeline), {**SMALL, "negative_prompt": "blurry", "enable_prompt_rewrite": False}),
    ],
    "LongCatImageEditPipeline": [
        Case(
            lambda: _longcat(diffusers.LongCatImageEditPipeline, **DEEP),
            {"image": pil_pictures(64)[0], "num_inference_steps": 4, "guidance_scale": 3.0, "negative_prompt": "blurry"},
            one_sample=True,
        )
    ],
}

ABSENT: dict[str, str] = {}
