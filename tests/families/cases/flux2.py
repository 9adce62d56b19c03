"""Flux 2: its own autoencoder, a language model as text encoder, pictures that all prompts share."""

from __future__ import annotations

import diffusers
import transformers

from ..case import Case
from ..parts import LANGUAGE_MODEL, LATENT_CHANNELS, TEXT_WIDTH, masks, pictures, pil_pictures, quiet, qwen3, seeded, shifted_flow
from ..vision_language import vision_tokenizer

LAYERS = 3


def flux2_vae() -> diffusers.AutoencoderKLFlux2:
    """Compresses 8 times; pipelines pack 2 x 2 of its latents and normalise them by its statistics."""
    vae = seeded(
        diffusers.AutoencoderKLFlux2, block_out_channels=(8,) * 4, layers_per_block=1, latent_channels=LATENT_CHANNELS, norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    vae.bn.running_mean.uniform_(-0.3, 0.3)
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae


def flux2(cls: type, **components):
    transformer = seeded(
        diffusers.Flux2Transformer2DModel, in_channels=4 * LATENT_CHANNELS, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=LAYERS * TEXT_WIDTH, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=cls is diffusers.Flux2Pipeline,
    )  # fmt: skip
    return quiet(cls(transformer=transformer, vae=flux2_vae(), scheduler=shifted_flow(use_dynamic_shifting=True), **components))


def _mistral():
    tokenizer = vision_tokenizer()
    text = {**LANGUAGE_MODEL, "model_type": "mistral", "vocab_size": len(tokenizer), "sliding_window": None}
    vision = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "image_size": 16,
        "patch_size": 4,
    }
    config = transformers.Mistral3Config(text_config=text, vision_config=vision, image_token_index=1)
    return {"tokenizer": tokenizer, "text_encoder": seeded(transformers.Mistral3ForConditionalGeneration, config)}


def _klein(cls: type, distilled: bool = False):
    tokenizer = vision_tokenizer()
    return flux2(cls, tokenizer=tokenizer, text_encoder=qwen3(transformers.Qwen3ForCausalLM, vocab_size=len(tokenizer)), is_distilled=distilled)


CALL = {
    "height": 32, "width": 32, "num_inference_steps": 4, "guidance_scale": 3.0, "text_encoder_out_layers": (0, 1, 2), "max_sequence_length": 64,
}  # fmt: skip
SHARED = {"image": pil_pictures(64)[0]}
UNGUIDED = {name: value for name, value in CALL.items() if name != "guidance_scale"}
LONGER = {"max_sequence_length": 640}

CASES: dict[str, list[Case]] = {
    "Flux2Pipeline": [
        Case(lambda: flux2(diffusers.Flux2Pipeline, **_mistral()), {**CALL, **LONGER}),
        Case(lambda: flux2(diffusers.Flux2Pipeline, **_mistral()), {**CALL, **LONGER, **SHARED}, variant="edit"),
    ],
    "Flux2KleinPipeline": [
        Case(lambda: _klein(diffusers.Flux2KleinPipeline), CALL),
        Case(lambda: _klein(diffusers.Flux2KleinPipeline), {**CALL, **SHARED}, variant="edit"),
    ],
    "Flux2KleinInpaintPipeline": [
        Case(
            lambda: _klein(diffusers.Flux2KleinInpaintPipeline),
            {**CALL, "strength": 0.8, "num_inference_steps": 5},
            {"image": pictures(32), "mask_image": masks(32)},
        )
    ],
    "Flux2KleinKVPipeline": [Case(lambda: _klein(diffusers.Flux2KleinKVPipeline, distilled=True), {**UNGUIDED, **SHARED})],
}

ABSENT: dict[str, str] = {}
