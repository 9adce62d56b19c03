"""Stock diffusers pipelines with tiny random weights, built in code: no download, no files, under a second each.

`FAMILIES` names them. Models keep the structure of their families (packed latents, several text encoders, a learned variance,
shifted and scaled autoencoders, schedulers as published) at a width of 8 to 32, so that what differs between families is
there to be tested.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import transformers

from tests.families.cases.cogvideo import cogvideox
from tests.families.cases.ltx import ltx
from tests.families.cases.wan import wan
from tests.families.parts import (
    CLIP_WIDTH,
    LANGUAGE_MODEL,
    LATENT_CHANNELS,
    STABLE_DIFFUSION_BETAS,
    TEXT_WIDTH,
    causal_vae,
    clip_parts,
    gemma_parts,
    image_vae,
    photograph,
    quiet,
    qwen_tokenizer,
    seeded,
    shifted_flow,
    t5_parts,
    unet,
)


@dataclass(frozen=True)
class Family:
    """How to build a pipeline and call it.

    Attributes:
        build: makes the pipeline, the same weights each time.
        call: arguments of each of its calls.
    """

    build: Callable[[], diffusers.DiffusionPipeline]
    call: dict[str, Any]


# --- noise-predicting families -----------------------------------------------------------------------------------------


def stable_diffusion(cls: type = diffusers.StableDiffusionPipeline, prediction_type: str = "epsilon", in_channels: int = LATENT_CHANNELS):
    scheduler = diffusers.DDIMScheduler(
        **STABLE_DIFFUSION_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type=prediction_type
    )  # fmt: skip
    absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return quiet(cls(unet=unet(in_channels=in_channels), vae=image_vae(), scheduler=scheduler, **clip_parts(), **absent))


def stable_diffusion_xl():
    denoiser = unet(
        cross_attention_dim=2 * CLIP_WIDTH, transformer_layers_per_block=(1, 2), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + CLIP_WIDTH,
    )  # fmt: skip
    scheduler = diffusers.EulerDiscreteScheduler(**STABLE_DIFFUSION_BETAS, timestep_spacing="leading", steps_offset=1)
    vae = image_vae(scaling_factor=0.13025)
    return quiet(diffusers.StableDiffusionXLPipeline(unet=denoiser, vae=vae, scheduler=scheduler, **clip_parts(), **clip_parts("_2", projected=True)))


def pixart_sigma():
    """Learns its variance beside the noise: twice the channels."""
    transformer = seeded(
        diffusers.PixArtTransformer2DModel, sample_size=8, in_channels=LATENT_CHANNELS, out_channels=2 * LATENT_CHANNELS, num_layers=1,
        num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, caption_channels=TEXT_WIDTH, use_additional_conditions=False,
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02)
    return quiet(diffusers.PixArtSigmaPipeline(transformer=transformer, vae=image_vae(), scheduler=scheduler, **t5_parts()))


# --- flow-matching families --------------------------------------------------------------------------------------------


def stable_diffusion_3():
    transformer = seeded(
        diffusers.SD3Transformer2DModel, sample_size=8, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, num_layers=2,
        num_attention_heads=2, attention_head_dim=8, caption_projection_dim=16, joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=2 * CLIP_WIDTH, pos_embed_max_size=16, qk_norm="rms_norm",
    )  # fmt: skip
    text = {**clip_parts(projected=True), **clip_parts("_2", projected=True), **t5_parts("_3")}
    vae = image_vae(scaling_factor=1.5305, shift_factor=0.0609)
    return quiet(diffusers.StableDiffusion3Pipeline(transformer=transformer, vae=vae, scheduler=shifted_flow(), **text))


def flux(cls: type = diffusers.FluxPipeline, guidance_embeds: bool = True):
    transformer = seeded(
        diffusers.FluxTransformer2DModel, in_channels=4 * LATENT_CHANNELS, num_layers=1, num_single_layers=1, num_attention_heads=2,
        attention_head_dim=16, axes_dims_rope=(4, 4, 8), joint_attention_dim=TEXT_WIDTH, pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=guidance_embeds,
    )  # fmt: skip
    scheduler = shifted_flow(use_dynamic_shifting=True)
    vae = image_vae(scaling_factor=0.3611, shift_factor=0.1159)
    return quiet(cls(transformer=transformer, vae=vae, scheduler=scheduler, **clip_parts(), **t5_parts("_2")))


def sana():
    """Its published scheduler is a multistep solver of the flow."""
    transformer = seeded(
        diffusers.SanaTransformer2DModel, sample_size=8, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, num_layers=1,
        num_attention_heads=2, attention_head_dim=8, num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
        caption_channels=TEXT_WIDTH,
    )  # fmt: skip
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in {
        "block_types": ("ResBlock", "EfficientViTBlock"), "block_out_channels": (8, 8), "layers_per_block": (1, 1), "qkv_multiscales": ((), (5,)),
    }.items()}  # fmt: skip
    vae = seeded(diffusers.AutoencoderDC, latent_channels=LATENT_CHANNELS, attention_head_dim=2, scaling_factor=0.41407, **sides)
    scheduler = diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return quiet(diffusers.SanaPipeline(transformer=transformer, vae=vae, scheduler=scheduler, **gemma_parts()))


def lumina2():
    transformer = seeded(
        diffusers.Lumina2Transformer2DModel, sample_size=8, in_channels=LATENT_CHANNELS, hidden_size=16, num_layers=1, num_refiner_layers=1,
        num_attention_heads=2, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 2, 2), axes_lens=(128, 32, 32), cap_feat_dim=TEXT_WIDTH,
    )  # fmt: skip
    vae = image_vae(levels=4, scaling_factor=0.3611, shift_factor=0.1159)
    return quiet(diffusers.Lumina2Pipeline(transformer=transformer, vae=vae, scheduler=shifted_flow(shift=6.0), **gemma_parts()))


def qwen_image():
    transformer = seeded(
        diffusers.QwenImageTransformer2DModel, in_channels=4 * LATENT_CHANNELS, out_channels=LATENT_CHANNELS, num_layers=1, num_attention_heads=2,
        attention_head_dim=16, axes_dims_rope=(4, 4, 8), joint_attention_dim=TEXT_WIDTH,
    )  # fmt: skip
    tokenizer = qwen_tokenizer()
    text = {**LANGUAGE_MODEL, "vocab_size": len(tokenizer), "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": TEXT_WIDTH}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    text_encoder = seeded(transformers.Qwen2_5_VLForConditionalGeneration, config)
    scheduler = shifted_flow(shift=1.0, use_dynamic_shifting=True, shift_terminal=0.02, time_shift_type="exponential")
    vae = causal_vae(diffusers.AutoencoderKLQwenImage)
    return quiet(diffusers.QwenImagePipeline(transformer=transformer, vae=vae, scheduler=scheduler, tokenizer=tokenizer, text_encoder=text_encoder))


def z_image():
    transformer = seeded(
        diffusers.ZImageTransformer2DModel, in_channels=LATENT_CHANNELS, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=TEXT_WIDTH, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    tokenizer = qwen_tokenizer()
    text_encoder = seeded(transformers.Qwen3Model, transformers.Qwen3Config(vocab_size=len(tokenizer), **LANGUAGE_MODEL))
    vae = image_vae(scaling_factor=0.3611, shift_factor=0.1159)
    return quiet(diffusers.ZImagePipeline(transformer=transformer, vae=vae, scheduler=shifted_flow(), tokenizer=tokenizer, text_encoder=text_encoder))


# --- the table ---------------------------------------------------------------------------------------------------------


SMALL = {"height": 16, "width": 16, "num_inference_steps": 4, "guidance_scale": 3.0}
LARGER = {**SMALL, "height": 32, "width": 32}
SHORT = {"max_sequence_length": 32}
TRUE_GUIDANCE = {"true_cfg_scale": 3.0, "negative_prompt": "blurry"}

FAMILIES = {
    "sd15": Family(stable_diffusion, SMALL),
    "sd15_v": Family(lambda: stable_diffusion(prediction_type="v_prediction"), SMALL),
    "sd15_img2img": Family(
        lambda: stable_diffusion(diffusers.StableDiffusionImg2ImgPipeline),
        {"image": photograph(), "strength": 0.8, "num_inference_steps": 5, "guidance_scale": 3.0},
    ),
    "sd15_edit": Family(
        lambda: stable_diffusion(diffusers.StableDiffusionInstructPix2PixPipeline, in_channels=2 * LATENT_CHANNELS),
        {"image": photograph(), "num_inference_steps": 4, "guidance_scale": 3.0, "image_guidance_scale": 1.5},
    ),
    "sdxl": Family(stable_diffusion_xl, SMALL),
    "pixart_sigma": Family(pixart_sigma, {**SMALL, **SHORT, "use_resolution_binning": False, "clean_caption": False}),
    "sd3": Family(stable_diffusion_3, {**SMALL, **SHORT}),
    "flux": Family(flux, {**SMALL, **SHORT}),
    "flux_true_cfg": Family(lambda: flux(guidance_embeds=False), {**SMALL, **SHORT, **TRUE_GUIDANCE}),
    "flux_kontext": Family(lambda: flux(diffusers.FluxKontextPipeline), {**SMALL, **SHORT, "image": photograph(), "max_area": 256, "_auto_resize": False}),
    "sana": Family(sana, {**LARGER, **SHORT, "use_resolution_binning": False, "complex_human_instruction": None}),
    "lumina2": Family(lumina2, {**LARGER, "system_prompt": "Draw.", "max_sequence_length": 48}),
    "qwen_image": Family(qwen_image, {**SMALL, **TRUE_GUIDANCE, "guidance_scale": None}),
    "z_image": Family(z_image, {**SMALL, "max_sequence_length": 64}),
    "wan": Family(lambda: quiet(wan()), {**SMALL, **SHORT, "num_frames": 5}),
    "cogvideox": Family(lambda: quiet(cogvideox()), {**SMALL, **SHORT, "num_frames": 5}),
    "ltx": Family(lambda: quiet(ltx()), {**LARGER, **SHORT, "num_frames": 5}),
}  # fmt: skip
