"""Stable Diffusion 1 and 2, and the pipelines of its module."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

from ..case import Case
from ..parts import (
    CLIP_WIDTH,
    LATENT_CHANNELS,
    STABLE_DIFFUSION_BETAS,
    clip,
    clip_parts,
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

GUIDED = {"num_inference_steps": 4, "guidance_scale": 3.0}
SMALL = {"height": 16, "width": 16, **GUIDED}
ABSENT_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def second_scheduler(**config: Any) -> diffusers.DDIMScheduler:
    return diffusers.DDIMScheduler(**{**STABLE_DIFFUSION_BETAS, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, **config})


def stable_diffusion(cls: type, **components: Any):
    """Any pipeline that has the parts of Stable Diffusion 1, with its scheduler unless another is given."""
    parts = {"unet": unet(), "vae": image_vae(), "scheduler": first_scheduler(), **clip_parts(), **ABSENT_CHECKER}
    return quiet(cls(**{**parts, **components}))


def image_variation():
    parts = {"image_encoder": picture_encoder(), "feature_extractor": picture_processor(), "safety_checker": None, "requires_safety_checker": False}
    return quiet(diffusers.StableDiffusionImageVariationPipeline(unet=unet(), vae=image_vae(), scheduler=first_scheduler(), **parts))


def depth_to_image():
    backbone = {
        "image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16,
        "backbone_out_indices": (0, 1, 2, 3), "neck_hidden_sizes": (8, 8, 8, 8), "fusion_hidden_size": 8, "is_hybrid": False,
    }  # fmt: skip
    parts = {
        "depth_estimator": seeded(transformers.DPTForDepthEstimation, transformers.DPTConfig(**backbone)),
        "feature_extractor": transformers.DPTImageProcessor(size={"height": 16, "width": 16}, do_rescale=False),
    }
    denoiser = unet(in_channels=LATENT_CHANNELS + 1)
    return quiet(diffusers.StableDiffusionDepth2ImgPipeline(unet=denoiser, vae=image_vae(), scheduler=first_scheduler(), **clip_parts(), **parts))


def upscale():
    """The low-resolution picture is as large as the latents."""
    parts = {"low_res_scheduler": diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.0001, beta_end=0.02)}
    denoiser = unet(in_channels=LATENT_CHANNELS + 3, num_class_embeds=400)
    scheduler = second_scheduler(prediction_type="v_prediction")
    return quiet(diffusers.StableDiffusionUpscalePipeline(unet=denoiser, vae=image_vae(3), scheduler=scheduler, **clip_parts(), **parts))


def latent_upscale():
    denoiser = unet(
        act_fn="gelu", attention_head_dim=8, norm_num_groups=None, block_out_channels=(32, 32, 64, 64), time_cond_proj_dim=2 * 64 + CLIP_WIDTH,
        conv_in_kernel=1, conv_out_kernel=1, down_block_types=("KDownBlock2D", *["KCrossAttnDownBlock2D"] * 3),
        up_block_types=(*["KCrossAttnUpBlock2D"] * 3, "KUpBlock2D"),
        mid_block_type=None, in_channels=2 * LATENT_CHANNELS, out_channels=LATENT_CHANNELS + 1, resnet_time_scale_shift="scale_shift",
        time_embedding_type="fourier", timestep_post_act="gelu",
    )  # fmt: skip
    scheduler = diffusers.EulerDiscreteScheduler(**STABLE_DIFFUSION_BETAS, prediction_type="sample")
    return quiet(diffusers.StableDiffusionLatentUpscalePipeline(unet=denoiser, vae=image_vae(), scheduler=scheduler, **clip_parts()))


def unclip_parts() -> dict[str, Any]:
    denoiser = unet(class_embed_type="projection", projection_class_embeddings_input_dim=2 * CLIP_WIDTH)
    normalizer = seeded(StableUnCLIPImageNormalizer, embedding_dim=CLIP_WIDTH)
    scheduler = second_scheduler(prediction_type="v_prediction")
    noising = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    parts = {"unet": denoiser, "vae": image_vae(), "scheduler": scheduler, "image_normalizer": normalizer, "image_noising_scheduler": noising}
    return {**parts, **clip_parts()}


def stable_unclip():
    tokenizer = clip_tokenizer()
    prior = seeded(diffusers.PriorTransformer, num_attention_heads=2, attention_head_dim=8, embedding_dim=CLIP_WIDTH, num_layers=1)
    prior_scheduler = diffusers.UnCLIPScheduler(prediction_type="sample", variance_type="fixed_small_log", clip_sample_range=5.0)
    parts = {"prior_tokenizer": tokenizer, "prior_text_encoder": clip(tokenizer, projected=True), "prior": prior, "prior_scheduler": prior_scheduler}
    return quiet(diffusers.StableUnCLIPPipeline(**unclip_parts(), **parts))


def stable_unclip_img2img():
    parts = {"image_encoder": picture_encoder(), "feature_extractor": picture_processor()}
    return quiet(diffusers.StableUnCLIPImg2ImgPipeline(**unclip_parts(), **parts))


EDIT = {"num_inference_steps": 5, "guidance_scale": 3.0, "strength": 0.8}
CASES: dict[str, list[Case]] = {
    "StableDiffusionPipeline": [
        Case(lambda: stable_diffusion(diffusers.StableDiffusionPipeline, scheduler=second_scheduler()), SMALL),
        Case(
            lambda: stable_diffusion(diffusers.StableDiffusionPipeline, scheduler=second_scheduler(prediction_type="v_prediction")),
            SMALL,
            variant="v-prediction",
        ),
    ],
    "StableDiffusionImg2ImgPipeline": [Case(lambda: stable_diffusion(diffusers.StableDiffusionImg2ImgPipeline), EDIT, {"image": pictures()})],
    "StableDiffusionInpaintPipeline": [
        Case(
            lambda: stable_diffusion(diffusers.StableDiffusionInpaintPipeline, unet=unet(in_channels=2 * LATENT_CHANNELS + 1)),
            SMALL,
            {"image": pictures(), "mask_image": masks()},
        ),
        Case(
            lambda: stable_diffusion(diffusers.StableDiffusionInpaintPipeline),
            {**SMALL, **EDIT},
            {"image": pictures(), "mask_image": masks()},
            variant="blending",
            remark="a denoiser of text to image: the known part is put back after every step",
        ),
    ],
    "StableDiffusionInstructPix2PixPipeline": [
        Case(
            lambda: stable_diffusion(diffusers.StableDiffusionInstructPix2PixPipeline, unet=unet(in_channels=2 * LATENT_CHANNELS)),
            {**GUIDED, "image_guidance_scale": 1.5},
            {"image": pictures()},
        )
    ],
    "StableDiffusionDepth2ImgPipeline": [Case(depth_to_image, EDIT, {"image": [picture[0] for picture in pictures()]})],
    "StableDiffusionImageVariationPipeline": [Case(image_variation, SMALL, {"image": pictures()}, prompts=None)],
    "StableDiffusionUpscalePipeline": [Case(upscale, GUIDED, {"image": pictures(8)})],
    "StableDiffusionLatentUpscalePipeline": [Case(latent_upscale, GUIDED, {"image": pictures()})],
    "StableUnCLIPPipeline": [Case(stable_unclip, {**SMALL, "prior_num_inference_steps": 2, "prior_guidance_scale": 2.0})],
    "StableUnCLIPImg2ImgPipeline": [Case(stable_unclip_img2img, SMALL, {"image": [picture[0] for picture in pictures()]})],
}

_ONNX = "runs ONNX files, not torch modules: there is no gradient"
ABSENT: dict[str, str] = dict.fromkeys(
    (
        "OnnxStableDiffusionPipeline", "OnnxStableDiffusionImg2ImgPipeline", "OnnxStableDiffusionInpaintPipeline", "OnnxStableDiffusionUpscalePipeline",
        "OnnxStableDiffusionInpaintPipelineLegacy", "StableDiffusionOnnxPipeline",
    ),
    _ONNX,
)  # fmt: skip
