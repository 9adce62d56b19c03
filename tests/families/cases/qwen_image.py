"""Qwen-Image: text, images, masks, control, edits, layers; and Qwen-Image 2.1, which keeps keys and values from step to step."""

from __future__ import annotations

import diffusers
import transformers

from ..case import Case
from ..parts import LATENT_CHANNELS, SMALL, TEXT_WIDTH, TRUE_GUIDANCE, causal_vae, masks, pictures, pil_pictures, quiet, seeded, shifted_flow
from ..vision_language import qwen2_5_vl, qwen3_vl, vision_processor, vision_tokenizer

PACKED = 4 * LATENT_CHANNELS
DENOISER = {
    "in_channels": PACKED, "out_channels": LATENT_CHANNELS, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 4, 8),
    "joint_attention_dim": TEXT_WIDTH,
}  # fmt: skip
# The edit pipelines resize pictures to a megapixel: an autoencoder that halves them six times leaves 8 x 8 tokens.
DEEP = {"base_dim": 2, "dim_mult": [1] * 7, "temperal_downsample": [False] * 6, "num_res_blocks": 0}


def qwen_scheduler() -> diffusers.FlowMatchEulerDiscreteScheduler:
    return shifted_flow(shift=1.0, use_dynamic_shifting=True, shift_terminal=0.02, time_shift_type="exponential")


def qwen_image(cls: type = diffusers.QwenImagePipeline, vae: dict | None = None, config: dict | None = None, **components):
    transformer = seeded(diffusers.QwenImageTransformer2DModel, **{**DENOISER, **(config or {})})
    parts = {"tokenizer": vision_tokenizer(), "text_encoder": qwen2_5_vl(), "scheduler": qwen_scheduler()}
    return quiet(cls(transformer=transformer, vae=causal_vae(diffusers.AutoencoderKLQwenImage, **(vae or {})), **parts, **components))


def _controlled(cls: type, **config):
    return qwen_image(cls, controlnet=seeded(diffusers.QwenImageControlNetModel, **{**DENOISER, **config}))


def _edit(cls: type, vae: dict = DEEP, **config):
    return qwen_image(cls, vae, config, processor=vision_processor())


def _layered():
    """Transparent pictures have four channels, and what has as many channels as the latents is taken for latents."""
    transparent = {**DEEP, "input_channels": 4, "z_dim": 8, "latents_mean": [0.1] * 8, "latents_std": [1.5] * 8}
    config = {"in_channels": 32, "out_channels": 8, "use_additional_t_cond": True, "use_layer3d_rope": True}
    return _edit(diffusers.QwenImageLayeredPipeline, transparent, **config)


def _qwen_image_21():
    """Its autoencoder compresses 16 times and has an alpha channel; its latents are not packed, and four of them stand in a token of the text encoder."""
    transformer = seeded(
        diffusers.QwenImage21Transformer2DModel, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, num_layers=1, attention_head_dim=16,
        num_attention_heads=2, context_in_dim=TEXT_WIDTH, mlp_ratio=2, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    statistics = {"latents_mean": [-0.3, -0.1, 0.1, 0.3], "latents_std": [0.5, 1.0, 1.5, 2.0]}
    vae = seeded(
        diffusers.AutoencoderKLQwenImage21, base_dim=4, decoder_base_dim=4, z_dim=LATENT_CHANNELS, dim_mult=[1] * 5, num_res_blocks=1,
        temperal_downsample=[False] * 4, **statistics,
    )  # fmt: skip
    parts = {"text_encoder": qwen3_vl(), "processor": vision_processor(transformers.Qwen3VLProcessor, tokens=4), "scheduler": qwen_scheduler()}
    return quiet(diffusers.QwenImage21Pipeline(transformer=transformer, vae=vae, **parts))


NEGATIVE = {"negative_prompt": ["blurry", "gray"]}
CALL = {**SMALL, **TRUE_GUIDANCE, "guidance_scale": None}
PART = {"strength": 0.8, "num_inference_steps": 5}
MASKED = {"image": pictures(), "mask_image": masks()}
EDIT = {"true_cfg_scale": 3.0, "height": 256, "width": 256, "num_inference_steps": 4}
NEWER = {"true_cfg_scale": 3.0, "height": 64, "width": 64, "num_inference_steps": 4}

CASES: dict[str, list[Case]] = {
    "QwenImagePipeline": [Case(qwen_image, CALL)],
    "QwenImageImg2ImgPipeline": [Case(lambda: qwen_image(diffusers.QwenImageImg2ImgPipeline), {**CALL, **PART}, {"image": pictures()})],
    "QwenImageInpaintPipeline": [Case(lambda: qwen_image(diffusers.QwenImageInpaintPipeline), {**CALL, **PART}, MASKED)],
    "QwenImageControlNetPipeline": [Case(lambda: _controlled(diffusers.QwenImageControlNetPipeline), CALL, {"control_image": pictures()})],
    "QwenImageControlNetInpaintPipeline": [
        Case(
            lambda: _controlled(diffusers.QwenImageControlNetInpaintPipeline, extra_condition_channels=LATENT_CHANNELS),
            CALL,
            {"control_image": pictures(), "control_mask": masks()},
        )
    ],
    "QwenImageEditPipeline": [Case(lambda: _edit(diffusers.QwenImageEditPipeline), EDIT, {"image": pil_pictures(), **NEGATIVE})],
    "QwenImageEditInpaintPipeline": [
        Case(lambda: _edit(diffusers.QwenImageEditInpaintPipeline), {**EDIT, **PART}, {"image": pil_pictures(), "mask_image": masks(), **NEGATIVE})
    ],
    "QwenImageEditPlusPipeline": [
        Case(lambda: _edit(diffusers.QwenImageEditPlusPipeline), {**EDIT, "image": pil_pictures(), "negative_prompt": "blurry"}, one_sample=True)
    ],
    "QwenImageLayeredPipeline": [
        Case(
            _layered,
            {
                "true_cfg_scale": 3.0,
                "num_inference_steps": 4,
                "layers": 2,
                "resolution": 640,
                "image": pil_pictures()[0].convert("RGBA"),
                "negative_prompt": "blurry",
            },
            one_sample=True,
            remark="Of two samples the stock call gives the second one too few layers.",
        )
    ],
    "QwenImage21Pipeline": [
        Case(_qwen_image_21, NEWER, NEGATIVE),
        Case(_qwen_image_21, {**NEWER, "image": pil_pictures(64)[:1], "output_resolution": 64}, NEGATIVE, variant="edit"),
    ],
}

ABSENT: dict[str, str] = {}
