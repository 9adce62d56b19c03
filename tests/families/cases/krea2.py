"""Krea 2: Qwen-Image's autoencoder, several layers of the text encoder, joined in the transformer."""

from __future__ import annotations

import diffusers
import transformers

from ..case import Case
from ..parts import LATENT_CHANNELS, SMALL, TEXT_WIDTH, causal_vae, quiet, seeded, shifted_flow
from ..vision_language import qwen3_vl, vision_tokenizer

LAYERS_TAKEN = (0, 1, 2)


def _krea2(distilled: bool = False):
    transformer = seeded(
        diffusers.Krea2Transformer2DModel, in_channels=4 * LATENT_CHANNELS, num_layers=1, attention_head_dim=8, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32, timestep_embed_dim=8, text_hidden_dim=TEXT_WIDTH, num_text_layers=len(LAYERS_TAKEN), text_num_attention_heads=2,
        text_num_key_value_heads=1, text_intermediate_size=16, num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 2, 2),
    )  # fmt: skip
    text = {"tokenizer": vision_tokenizer(), "text_encoder": qwen3_vl(transformers.Qwen3VLModel), "text_encoder_select_layers": LAYERS_TAKEN}
    vae = causal_vae(diffusers.AutoencoderKLQwenImage)
    scheduler = shifted_flow(use_dynamic_shifting=True)
    return quiet(diffusers.Krea2Pipeline(transformer=transformer, vae=vae, scheduler=scheduler, is_distilled=distilled, **text))


# The prompt's template alone has 150 tokens of one byte.
CALL = {**SMALL, "negative_prompt": "blurry", "max_sequence_length": 256}

CASES: dict[str, list[Case]] = {
    "Krea2Pipeline": [Case(_krea2, CALL), Case(lambda: _krea2(distilled=True), {**CALL, "guidance_scale": 0.0}, variant="turbo")],
}

ABSENT: dict[str, str] = {}
