"""Perturbed-attention guidance: pipelines whose guidance has a term of its own, `pag_scale`."""

from __future__ import annotations

import diffusers
import transformers

from ..case import Case
from ..parts import (
    CLIP_WIDTH,
    LATENT_CHANNELS,
    TEXT_WIDTH,
    clip_parts,
    gemma_parts,
    image_vae,
    masks,
    pictures,
    quiet,
    seeded,
    shifted_flow,
    t5_parts,
    xl_unet,
)  # fmt: skip
from .controlnet import control_net, controlled
from .latent_transformers import WITHOUT_CLEANING, pixart
from .stable_diffusion import EDIT, SMALL, stable_diffusion
from .stable_diffusion_xl import kolors, stable_diffusion_xl

PAG = {"pag_applied_layers": ["mid"]}
GUIDED = {"pag_scale": 2.0}
SMALL_PAG, EDIT_PAG = {**SMALL, **GUIDED}, {**SMALL, **EDIT, **GUIDED}


def controlled_xl(cls: type):
    return stable_diffusion_xl(cls, controlnet=control_net(xl_unet()), **PAG)


def stable_diffusion_3(cls: type):
    transformer = seeded(
        diffusers.SD3Transformer2DModel, sample_size=8, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, num_layers=2, num_attention_heads=2,
        attention_head_dim=8, caption_projection_dim=16, joint_attention_dim=TEXT_WIDTH, pooled_projection_dim=2 * CLIP_WIDTH, pos_embed_max_size=16,
    )  # fmt: skip
    text = {**clip_parts(projected=True), **clip_parts("_2", projected=True), **t5_parts("_3")}
    vae = image_vae(scaling_factor=1.5305, shift_factor=0.0609)
    return quiet(cls(transformer=transformer, vae=vae, scheduler=shifted_flow(), pag_applied_layers=["blocks.1"], **text))


def sana():
    transformer = seeded(
        diffusers.SanaTransformer2DModel, sample_size=8, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, num_layers=2, num_attention_heads=2,
        attention_head_dim=8, num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=TEXT_WIDTH,
    )  # fmt: skip
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in {
        "block_types": ("ResBlock", "EfficientViTBlock"), "block_out_channels": (8, 8), "layers_per_block": (1, 1), "qkv_multiscales": ((), (5,)),
    }.items()}  # fmt: skip
    vae = seeded(diffusers.AutoencoderDC, latent_channels=LATENT_CHANNELS, attention_head_dim=2, scaling_factor=0.41407, **sides)
    scheduler = diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    layers = ["transformer_blocks.0"]
    return quiet(diffusers.SanaPAGPipeline(transformer=transformer, vae=vae, scheduler=scheduler, pag_applied_layers=layers, **gemma_parts()))


def hunyuan_dit():
    """Its first text encoder is BERT's."""
    transformer = seeded(
        diffusers.HunyuanDiT2DModel, sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=LATENT_CHANNELS,
        cross_attention_dim=CLIP_WIDTH, cross_attention_dim_t5=TEXT_WIDTH, pooled_projection_dim=16, hidden_size=16, text_len=77, text_len_t5=256,
        activation_fn="gelu-approximate",
    )  # fmt: skip
    text, tokenizer = t5_parts("_2"), clip_parts()["tokenizer"]
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=CLIP_WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=77
    )
    text |= {"tokenizer": tokenizer, "text_encoder": seeded(transformers.BertModel, config)}
    scheduler = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.03, beta_schedule="scaled_linear", prediction_type="v_prediction", steps_offset=1)
    absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    layers = ["blocks.1"]
    return quiet(diffusers.HunyuanDiTPAGPipeline(transformer=transformer, vae=image_vae(), scheduler=scheduler, pag_applied_layers=layers, **text, **absent))


PICTURE, CONTROL = {"image": pictures()}, {"control_image": pictures()}
INPAINT = {**PICTURE, "mask_image": masks()}
TEXT = {"max_sequence_length": 32}
CASES: dict[str, list[Case]] = {
    "StableDiffusionPAGPipeline": [
        Case(lambda: stable_diffusion(diffusers.StableDiffusionPAGPipeline, **PAG), SMALL_PAG),
        Case(lambda: stable_diffusion(diffusers.StableDiffusionPAGPipeline, **PAG), {**SMALL_PAG, "guidance_scale": 0.0}, variant="without CFG"),
    ],
    "StableDiffusionPAGImg2ImgPipeline": [Case(lambda: stable_diffusion(diffusers.StableDiffusionPAGImg2ImgPipeline, **PAG), {**EDIT, **GUIDED}, PICTURE)],
    "StableDiffusionPAGInpaintPipeline": [Case(lambda: stable_diffusion(diffusers.StableDiffusionPAGInpaintPipeline, **PAG), EDIT_PAG, INPAINT)],
    "StableDiffusionControlNetPAGPipeline": [Case(lambda: controlled(diffusers.StableDiffusionControlNetPAGPipeline, **PAG), SMALL_PAG, PICTURE)],
    "StableDiffusionControlNetPAGInpaintPipeline": [
        Case(lambda: controlled(diffusers.StableDiffusionControlNetPAGInpaintPipeline, **PAG), EDIT_PAG, {**INPAINT, **CONTROL}),
    ],
    "StableDiffusionXLPAGPipeline": [Case(lambda: stable_diffusion_xl(diffusers.StableDiffusionXLPAGPipeline, **PAG), SMALL_PAG)],
    "StableDiffusionXLPAGImg2ImgPipeline": [
        Case(lambda: stable_diffusion_xl(diffusers.StableDiffusionXLPAGImg2ImgPipeline, **PAG), {**EDIT, **GUIDED}, PICTURE),
    ],
    "StableDiffusionXLPAGInpaintPipeline": [Case(lambda: stable_diffusion_xl(diffusers.StableDiffusionXLPAGInpaintPipeline, **PAG), EDIT_PAG, INPAINT)],
    "StableDiffusionXLControlNetPAGPipeline": [Case(lambda: controlled_xl(diffusers.StableDiffusionXLControlNetPAGPipeline), SMALL_PAG, PICTURE)],
    "StableDiffusionXLControlNetPAGImg2ImgPipeline": [
        Case(lambda: controlled_xl(diffusers.StableDiffusionXLControlNetPAGImg2ImgPipeline), EDIT_PAG, {**PICTURE, **CONTROL}),
    ],
    "KolorsPAGPipeline": [Case(lambda: kolors(diffusers.KolorsPAGPipeline, **PAG), {**SMALL_PAG, **TEXT})],
    "PixArtSigmaPAGPipeline": [
        Case(lambda: pixart(diffusers.PixArtSigmaPAGPipeline, num_layers=2, pag_applied_layers=["blocks.1"]), {**SMALL_PAG, **TEXT, **WITHOUT_CLEANING}),
    ],
    "SanaPAGPipeline": [
        Case(sana, {**SMALL_PAG, **TEXT, "height": 32, "width": 32, "use_resolution_binning": False, "complex_human_instruction": None}),
    ],
    "StableDiffusion3PAGPipeline": [Case(lambda: stable_diffusion_3(diffusers.StableDiffusion3PAGPipeline), {**SMALL_PAG, **TEXT})],
    "StableDiffusion3PAGImg2ImgPipeline": [Case(lambda: stable_diffusion_3(diffusers.StableDiffusion3PAGImg2ImgPipeline), {**EDIT_PAG, **TEXT}, PICTURE)],
    "HunyuanDiTPAGPipeline": [Case(hunyuan_dit, {**SMALL_PAG, "use_resolution_binning": False})],
}

ABSENT: dict[str, str] = {}
