"""Text to image by Stable Diffusion with guidance or inputs of another kind; most are deprecated in diffusers."""

from __future__ import annotations

import diffusers
import transformers
from diffusers.pipelines.deprecated.alt_diffusion.modeling_roberta_series import RobertaSeriesConfig, RobertaSeriesModelWithTransformation
from diffusers.pipelines.stable_diffusion.clip_image_project_model import CLIPImageProjection

from ..case import Case
from ..parts import (
    CLIP_WIDTH,
    STABLE_DIFFUSION_BETAS,
    clip_tokenizer,
    image_vae,
    picture_encoder,
    picture_processor,
    pictures,
    seeded,
    unet,
)  # fmt: skip
from .stable_diffusion import EDIT, GUIDED, SMALL, second_scheduler, stable_diffusion
from .stable_diffusion_xl import stable_diffusion_xl


def alt_diffusion(cls: type):
    """Its text encoder reads many languages."""
    tokenizer = clip_tokenizer()
    config = RobertaSeriesConfig(
        vocab_size=len(tokenizer), hidden_size=CLIP_WIDTH, project_dim=CLIP_WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=80, type_vocab_size=1,
    )  # fmt: skip
    return stable_diffusion(cls, tokenizer=tokenizer, text_encoder=seeded(RobertaSeriesModelWithTransformation, config))


def depth_and_colour():
    """The autoencoder has a picture and its depth."""
    return stable_diffusion(diffusers.StableDiffusionLDM3DPipeline, vae=image_vae(in_channels=6, out_channels=6), image_encoder=None)


def panorama():
    """Wide enough for two windows of 64 latents, which the pipeline takes to be 512 pixels wide."""
    return stable_diffusion(diffusers.StableDiffusionPanoramaPipeline, vae=image_vae(levels=4), scheduler=second_scheduler())


def safe():
    """Its text of what is unsafe is set for the time of a call."""
    return stable_diffusion(diffusers.StableDiffusionPipelineSafe)


def boxes():
    return stable_diffusion(diffusers.StableDiffusionGLIGENPipeline, unet=unet(attention_type="gated"))


def boxes_with_pictures():
    processor = transformers.CLIPProcessor(image_processor=picture_processor(), tokenizer=clip_tokenizer())
    parts = {"processor": processor, "image_encoder": picture_encoder(), "image_project": seeded(CLIPImageProjection, hidden_size=CLIP_WIDTH)}
    return stable_diffusion(diffusers.StableDiffusionGLIGENTextImagePipeline, unet=unet(attention_type="gated-text-image"), **parts)


def parallel():
    scheduler = diffusers.DDIMParallelScheduler(**STABLE_DIFFUSION_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return stable_diffusion(diffusers.StableDiffusionParadigmsPipeline, scheduler=scheduler)


CONCEPT = {"editing_prompt": ["glasses"], "edit_guidance_scale": [3.0], "edit_warmup_steps": [1], "edit_threshold": [0.8], "edit_weights": [1.0]}
BOXES = {"gligen_phrases": ["a cake"], "gligen_boxes": [[0.25, 0.25, 0.75, 0.75]], "gligen_scheduled_sampling_beta": 0.5}
FRAMES = {"video_length": 2, "t0": 1, "t1": 2, "num_inference_steps": 4, "guidance_scale": 3.0, "height": 16, "width": 16}
CASES: dict[str, list[Case]] = {
    "AltDiffusionPipeline": [Case(lambda: alt_diffusion(diffusers.AltDiffusionPipeline), SMALL)],
    "AltDiffusionImg2ImgPipeline": [Case(lambda: alt_diffusion(diffusers.AltDiffusionImg2ImgPipeline), EDIT, {"image": pictures()})],
    "StableDiffusionLDM3DPipeline": [Case(depth_and_colour, SMALL)],
    "StableDiffusionPanoramaPipeline": [Case(panorama, {**GUIDED, "height": 64, "width": 576})],
    "StableDiffusionPipelineSafe": [Case(safe, {**SMALL, "sld_warmup_steps": 1})],
    "SemanticStableDiffusionPipeline": [Case(lambda: stable_diffusion(diffusers.SemanticStableDiffusionPipeline), {**SMALL, **CONCEPT})],
    "StableDiffusionSAGPipeline": [Case(lambda: stable_diffusion(diffusers.StableDiffusionSAGPipeline, scheduler=second_scheduler()), SMALL)],
    "StableDiffusionAttendAndExcitePipeline": [
        Case(
            lambda: stable_diffusion(diffusers.StableDiffusionAttendAndExcitePipeline),
            {**SMALL, "max_iter_to_alter": 2, "thresholds": {0: 0.05}, "attn_res": (4, 4)},
            {"token_indices": [[2, 3], [2, 4]]},
        )
    ],
    "StableDiffusionGLIGENPipeline": [Case(boxes, {**SMALL, **BOXES})],
    "StableDiffusionGLIGENTextImagePipeline": [Case(boxes_with_pictures, {**SMALL, **BOXES, "gligen_images": None})],
    "StableDiffusionModelEditingPipeline": [Case(lambda: stable_diffusion(diffusers.StableDiffusionModelEditingPipeline, scheduler=second_scheduler()), SMALL)],
    "StableDiffusionParadigmsPipeline": [Case(parallel, {**SMALL, "parallel": 2})],
    "TextToVideoZeroPipeline": [
        Case(lambda: stable_diffusion(diffusers.TextToVideoZeroPipeline, scheduler=second_scheduler()), FRAMES, one_sample=True),
    ],
    "TextToVideoZeroSDXLPipeline": [
        Case(lambda: stable_diffusion_xl(diffusers.TextToVideoZeroSDXLPipeline, scheduler=second_scheduler()), FRAMES, one_sample=True),
    ],
}

ABSENT: dict[str, str] = {}
