"""Z-Image: text, images, masks, control, and pictures beside the text."""

from __future__ import annotations

import diffusers
import torch
import transformers

from ..case import Case
from ..parts import LATENT_CHANNELS, SMALL, TEXT_WIDTH, image_vae, masks, pictures, pil_pictures, quiet, qwen3, qwen_tokenizer, seeded, shifted_flow

DENOISER = {
    "in_channels": LATENT_CHANNELS, "dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": TEXT_WIDTH,
    "axes_dims": [8, 4, 4], "axes_lens": [256, 32, 32],
}  # fmt: skip
SIGLIP_WIDTH = 16


def z_image(cls: type = diffusers.ZImagePipeline, config: dict | None = None, **components):
    transformer = seeded(diffusers.ZImageTransformer2DModel, **DENOISER, **(config or {}))
    vae = image_vae(scaling_factor=0.3611, shift_factor=0.1159)
    text = {"tokenizer": qwen_tokenizer(), "text_encoder": qwen3()}
    return quiet(cls(transformer=transformer, vae=vae, scheduler=shifted_flow(), **text, **components))


def _controlled(cls: type, channels: int):
    controlnet = seeded(
        diffusers.ZImageControlNetModel, control_layers_places=[0], control_refiner_layers_places=[0], control_in_dim=channels,
        add_control_noise_refiner="control_noise_refiner", dim=32, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
    )  # fmt: skip
    return z_image(cls, controlnet=controlnet)


def _omni():
    """It casts pictures to bfloat16 before it encodes them, whatever the autoencoder's dtype."""
    vision = transformers.Siglip2VisionConfig(
        hidden_size=SIGLIP_WIDTH, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=4, num_patches=16
    )
    processor = transformers.Siglip2ImageProcessor(patch_size=4, max_num_patches=16)
    siglip = seeded(transformers.Siglip2VisionModel, vision)
    pipeline = z_image(diffusers.ZImageOmniPipeline, {"siglip_feat_dim": SIGLIP_WIDTH}, siglip=siglip, siglip_processor=processor)
    pipeline.vae.to(torch.bfloat16)
    return pipeline


CALL = {**SMALL, "max_sequence_length": 64}
PART = {"strength": 0.8, "num_inference_steps": 5}
NEGATIVE = {"negative_prompt": ["blurry", "gray"]}
MASKED = {"image": pictures(), "mask_image": masks()}
CONTROL = {"control_image": pictures()}

CASES: dict[str, list[Case]] = {
    "ZImagePipeline": [Case(z_image, CALL, NEGATIVE)],
    "ZImageImg2ImgPipeline": [Case(lambda: z_image(diffusers.ZImageImg2ImgPipeline), {**CALL, **PART}, {"image": pictures(), **NEGATIVE})],
    "ZImageInpaintPipeline": [Case(lambda: z_image(diffusers.ZImageInpaintPipeline), {**CALL, **PART}, {**MASKED, **NEGATIVE})],
    "ZImageControlNetPipeline": [Case(lambda: _controlled(diffusers.ZImageControlNetPipeline, LATENT_CHANNELS), CALL, {**CONTROL, **NEGATIVE})],
    "ZImageControlNetInpaintPipeline": [
        Case(lambda: _controlled(diffusers.ZImageControlNetInpaintPipeline, 2 * LATENT_CHANNELS + 1), CALL, {**MASKED, **CONTROL, **NEGATIVE})
    ],
    "ZImageOmniPipeline": [
        Case(_omni, CALL, NEGATIVE),
        Case(_omni, {**CALL, "image": pil_pictures(64)[0]}, NEGATIVE, variant="edit"),
    ],
}

ABSENT: dict[str, str] = {}
