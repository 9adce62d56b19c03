"""Edits and variations of given pictures by Stable Diffusion's networks, other than its own pipelines; most are deprecated in diffusers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers.pipelines.deprecated.paint_by_example.image_encoder import PaintByExampleImageEncoder
from diffusers.pipelines.deprecated.unidiffuser import UniDiffuserModel, UniDiffuserTextDecoder
from PIL import Image

from ..case import Case
from ..parts import (
    CLIP_WIDTH,
    LATENT_CHANNELS,
    STABLE_DIFFUSION_BETAS,
    clip,
    clip_tokenizer,
    first_scheduler,
    image_vae,
    masks,
    picture_encoder,
    picture_processor,
    pictures,
    quiet,
    seeded,
    unet,
)  # fmt: skip
from .stable_diffusion import EDIT, GUIDED, SMALL, second_scheduler, stable_diffusion
from .stable_diffusion_xl import stable_diffusion_xl


def inverse_scheduler() -> diffusers.DDIMInverseScheduler:
    return diffusers.DDIMInverseScheduler(**STABLE_DIFFUSION_BETAS, clip_sample=False)


def diff_edit():
    return stable_diffusion(diffusers.StableDiffusionDiffEditPipeline, scheduler=second_scheduler(), inverse_scheduler=inverse_scheduler())


def pix_to_pix_zero():
    absent = {"caption_generator": None, "caption_processor": None}
    parts = {"scheduler": second_scheduler(), "inverse_scheduler": inverse_scheduler(), **absent}
    return stable_diffusion(diffusers.StableDiffusionPix2PixZeroPipeline, **parts)


def ledits(cls: type, build: Callable, number: int):
    """It edits what it has inverted before."""
    scheduler = diffusers.DPMSolverMultistepScheduler(**STABLE_DIFFUSION_BETAS, algorithm_type="sde-dpmsolver++", solver_order=2)
    pipeline = build(cls, scheduler=scheduler)
    given = [Image.fromarray((255 * picture[0].permute(1, 2, 0)).to(torch.uint8).numpy()) for picture in pictures(32)]
    pipeline.invert(image=given[:number], source_prompt="", num_inversion_steps=4, skip=0.25, generator=torch.Generator().manual_seed(0))
    return pipeline


def paint_by_example():
    encoder = picture_encoder(cls=PaintByExampleImageEncoder)
    parts = {"image_encoder": encoder, "feature_extractor": picture_processor(), "safety_checker": None}
    denoiser = unet(in_channels=2 * LATENT_CHANNELS + 1)
    return quiet(diffusers.PaintByExamplePipeline(unet=denoiser, vae=image_vae(), scheduler=first_scheduler(), **parts))


def uni_diffuser():
    """One network for pictures, texts and both together, of which each has noise of its own."""
    tokenizer = clip_tokenizer()
    decoder = seeded(
        UniDiffuserTextDecoder, prefix_length=77, prefix_inner_dim=CLIP_WIDTH, prefix_hidden_dim=CLIP_WIDTH, vocab_size=len(tokenizer), n_positions=128,
        n_embd=16, n_layer=1, n_head=2,
    )  # fmt: skip
    denoiser = seeded(
        UniDiffuserModel, text_dim=CLIP_WIDTH, clip_img_dim=CLIP_WIDTH, num_attention_heads=2, attention_head_dim=8, in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS, num_layers=2, norm_num_groups=2, sample_size=8, patch_size=2, activation_fn="gelu", use_data_type_embedding=True,
        ff_final_dropout=False,
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler(**STABLE_DIFFUSION_BETAS, solver_order=3)
    parts = {"image_encoder": picture_encoder(), "clip_image_processor": picture_processor(), "clip_tokenizer": tokenizer, "text_encoder": clip(tokenizer)}
    parts |= {"text_decoder": decoder, "text_tokenizer": tokenizer}
    return quiet(diffusers.UniDiffuserPipeline(unet=denoiser, vae=image_vae(), scheduler=scheduler, **parts))


def versatile_parts(*names: str) -> dict[str, Any]:
    """Those of Versatile Diffusion with these names. Its network for texts lends its layers to the one for pictures, which has them already once a
    pipeline is saved: it is then absent."""
    tokenizer = clip_tokenizer()
    parts = {
        "image_unet": unet, "text_unet": lambda: None, "image_encoder": picture_encoder,
        "image_feature_extractor": picture_processor, "tokenizer": lambda: tokenizer, "text_encoder": lambda: clip(tokenizer, projected=True),
    }  # fmt: skip
    return {"vae": image_vae(), "scheduler": second_scheduler(), **{name: parts[name]() for name in names}}


def versatile(cls: type, *names: str):
    return quiet(cls(**versatile_parts(*names)))


def _inverted_latents() -> torch.Tensor:
    """(2, 4, 4, 8, 8): what DiffEdit's inversion leaves, the latents of each step."""
    return torch.randn(2, 4, LATENT_CHANNELS, 8, 8, generator=torch.Generator().manual_seed(0))


def _edit_directions() -> dict[str, torch.Tensor]:
    embeddings = torch.randn(2, 77, CLIP_WIDTH, generator=torch.Generator().manual_seed(0))
    return {"source_embeds": embeddings[:1], "target_embeds": embeddings[1:]}


PICTURE, MASK = {"image": pictures()}, {"mask_image": masks()}
CONCEPTS = {
    "editing_prompt": ["glasses", "sun"], "edit_guidance_scale": [3.0, 2.0], "edit_threshold": [0.8, 0.8], "reverse_editing_direction": [False, True],
    "use_intersect_mask": False,
}  # fmt: skip
CASES: dict[str, list[Case]] = {
    "CycleDiffusionPipeline": [
        Case(
            lambda: stable_diffusion(diffusers.CycleDiffusionPipeline, scheduler=second_scheduler()),
            {**EDIT, "eta": 0.1},
            {**PICTURE, "source_prompt": ["a dog", "a small dog"]},
        )
    ],
    "StableDiffusionInpaintPipelineLegacy": [
        Case(
            lambda: stable_diffusion(diffusers.StableDiffusionInpaintPipelineLegacy),
            EDIT,
            {"image": torch.cat(pictures()), "mask_image": torch.cat(masks())},
        )
    ],
    "StableDiffusionDiffEditPipeline": [
        Case(diff_edit, {**GUIDED, "inpaint_strength": 1.0}, {"mask_image": [mask[0, :, ::2, ::2] for mask in masks()], "image_latents": _inverted_latents()}),
    ],
    "StableDiffusionPix2PixZeroPipeline": [Case(pix_to_pix_zero, {**SMALL, **_edit_directions()})],
    "LEditsPPPipelineStableDiffusion": [Case(lambda: ledits(diffusers.LEditsPPPipelineStableDiffusion, stable_diffusion, 2), CONCEPTS, prompts=None)],
    "LEditsPPPipelineStableDiffusionXL": [
        Case(lambda: ledits(diffusers.LEditsPPPipelineStableDiffusionXL, stable_diffusion_xl, 1), CONCEPTS, prompts=None, one_sample=True),
    ],
    "PaintByExamplePipeline": [
        Case(paint_by_example, SMALL, {"example_image": pictures(), "image": torch.cat(pictures()), "mask_image": torch.cat(masks())}, prompts=None),
    ],
    "UniDiffuserPipeline": [Case(uni_diffuser, SMALL)],
    "VersatileDiffusionTextToImagePipeline": [
        Case(lambda: versatile(diffusers.VersatileDiffusionTextToImagePipeline, "image_unet", "text_unet", "tokenizer", "text_encoder"), SMALL),
    ],
    "VersatileDiffusionImageVariationPipeline": [
        Case(
            lambda: versatile(diffusers.VersatileDiffusionImageVariationPipeline, "image_unet", "image_encoder", "image_feature_extractor"),
            SMALL,
            PICTURE,
            prompts=None,
        )
    ],
}  # fmt: skip

_BLIP = "its own call fails: its Blip2QFormerModel asks transformers for invert_attention_mask, which version 5 does not have"
ABSENT: dict[str, str] = {
    "VersatileDiffusionPipeline": "has no call: its methods make the three other pipelines of the family and call those",
    "BlipDiffusionPipeline": _BLIP,
    "BlipDiffusionControlNetPipeline": _BLIP,
    "VersatileDiffusionDualGuidedPipeline": "its own call fails: its DualTransformer2DModel does not take the encoder_attention_mask that the UNet gives it",
}
