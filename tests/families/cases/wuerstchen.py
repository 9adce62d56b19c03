"""Wuerstchen and Stable Cascade: a prior of small latents and a decoder of larger ones; UnCLIP; Shap-E, whose samples are objects."""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
import torch
import transformers
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel, WuerstchenDiffNeXt, WuerstchenPrior
from diffusers.pipelines.shap_e.renderer import ShapERenderer

from ..case import Case
from ..parts import CLIP_WIDTH, clip_parts, photograph, seeded, unet
from ..video_parts import clip_vision, two_pictures

PRIOR = {"height": 64, "width": 64, "num_inference_steps": 4, "guidance_scale": 3.0}


# --- Stable Cascade and Wuerstchen -------------------------------------------------------------------------------------


def continuous() -> diffusers.DDPMWuerstchenScheduler:
    return diffusers.DDPMWuerstchenScheduler()


def vqgan() -> torch.nn.Module:
    return seeded(PaellaVQModel, bottleneck_blocks=1, num_vq_embeddings=2, embed_dim=16)


def cascade_prior(prefix: str = "") -> dict[str, Any]:
    prior = seeded(
        diffusers.StableCascadeUNet, in_channels=16, out_channels=16, conditioning_dim=32, block_out_channels=(32, 32), num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1), up_num_layers_per_block=(1, 1), clip_image_in_channels=16, clip_text_in_channels=CLIP_WIDTH,
        clip_text_pooled_in_channels=CLIP_WIDTH, switch_level=(False,), down_blocks_repeat_mappers=(1, 1), up_blocks_repeat_mappers=(1, 1),
        block_types_per_layer=(("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),) * 2, timestep_ratio_embedding_dim=16,
        patch_size=1, kernel_size=3, dropout=(0.0, 0.0),
    )  # fmt: skip
    parts = {"prior": prior, "scheduler": continuous(), "feature_extractor": None, "image_encoder": None, **clip_parts(projected=True)}
    return {f"{prefix}{name}": value for name, value in parts.items()}


def cascade_decoder() -> dict[str, Any]:
    decoder = seeded(
        diffusers.StableCascadeUNet, in_channels=4, out_channels=4, conditioning_dim=32, block_out_channels=(16, 32), num_attention_heads=(-1, 2),
        down_num_layers_per_block=(1, 1), up_num_layers_per_block=(1, 1), down_blocks_repeat_mappers=(1, 1), up_blocks_repeat_mappers=(1, 1),
        block_types_per_layer=(("SDCascadeResBlock", "SDCascadeTimestepBlock"), ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")),
        switch_level=None, clip_text_pooled_in_channels=CLIP_WIDTH, timestep_ratio_embedding_dim=16, patch_size=2, kernel_size=3, dropout=(0.0, 0.0),
        effnet_in_channels=16,
    )  # fmt: skip
    return {"decoder": decoder, "scheduler": continuous(), "vqgan": vqgan(), **clip_parts(projected=True)}


def wuerstchen_prior(prefix: str = "") -> dict[str, Any]:
    prior = seeded(WuerstchenPrior, c_in=2, c=8, depth=2, c_cond=CLIP_WIDTH, c_r=8, nhead=2)
    parts = {"prior": prior, "scheduler": continuous(), **clip_parts()}
    return {f"{prefix}{name}": value for name, value in parts.items()}


def wuerstchen_decoder() -> dict[str, Any]:
    decoder = seeded(
        WuerstchenDiffNeXt, c_cond=CLIP_WIDTH, c_hidden=[16, 32, 64, 128], nhead=[-1, -1, 1, 1], blocks=[1, 1, 1, 1], level_config=["CT", "CT", "CTA", "CTA"],
        inject_effnet=[False, True, True, True], effnet_embd=2, clip_embd=CLIP_WIDTH,
    )  # fmt: skip
    return {"decoder": decoder, "scheduler": continuous(), "vqgan": vqgan(), **clip_parts()}


# --- UnCLIP ------------------------------------------------------------------------------------------------------------


def unclip_decoder() -> dict[str, Any]:
    fields = {
        "layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 4, "resnet_time_scale_shift": "scale_shift",
    }  # fmt: skip
    decoder = unet(
        sample_size=16, in_channels=3, out_channels=6, down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), mid_block_type="UNetMidBlock2DSimpleCrossAttn", class_embed_type="identity",
        cross_attention_dim=CLIP_WIDTH, **fields,
    )  # fmt: skip
    super_resolution = [
        seeded(
            diffusers.UNet2DModel, sample_size=32, in_channels=6, out_channels=3, down_block_types=("ResnetDownsampleBlock2D",) * 2,
            up_block_types=("ResnetUpsampleBlock2D",) * 2, **fields,
        )
        for _ in range(2)
    ]  # fmt: skip
    projection = seeded(UnCLIPTextProjModel, clip_embeddings_dim=CLIP_WIDTH, time_embed_dim=32, cross_attention_dim=CLIP_WIDTH)
    return {
        "decoder": decoder,
        "super_res_first": super_resolution[0],
        "super_res_last": super_resolution[1],
        "text_proj": projection,
        "decoder_scheduler": diffusers.UnCLIPScheduler(variance_type="learned_range", prediction_type="epsilon"),
        "super_res_scheduler": diffusers.UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="epsilon"),
        **clip_parts(projected=True),
    }  # fmt: skip


def prior_transformer(**config: Any) -> torch.nn.Module:
    return seeded(diffusers.PriorTransformer, num_attention_heads=2, attention_head_dim=8, embedding_dim=CLIP_WIDTH, num_layers=1, **config)


def unclip():
    prior = prior_transformer()
    prior.clip_std.data.fill_(1.0)  # zeros by themselves
    scheduler = diffusers.UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0)
    return diffusers.UnCLIPPipeline(prior=prior, prior_scheduler=scheduler, **unclip_decoder())


def unclip_variation():
    encoder = clip_vision(width=CLIP_WIDTH, projection=CLIP_WIDTH, size=16, patch=8)
    processor = transformers.CLIPImageProcessor(crop_size=16, size=16)
    return diffusers.UnCLIPImageVariationPipeline(feature_extractor=processor, image_encoder=encoder, **unclip_decoder())


UNCLIP = {"decoder_num_inference_steps": 3, "super_res_num_inference_steps": 2}


# --- Shap-E ------------------------------------------------------------------------------------------------------------


def shap_e(cls: type):
    pictures = cls is diffusers.ShapEImg2ImgPipeline
    prior = seeded(
        diffusers.PriorTransformer, num_attention_heads=2, attention_head_dim=8, embedding_dim=8, num_embeddings=32, embedding_proj_dim=CLIP_WIDTH,
        time_embed_dim=32, num_layers=1, clip_embed_dim=16, additional_embeddings=0, time_embed_act_fn="gelu", norm_in_type="layer",
        encoder_hid_proj_type=None, added_emb_type=None, embedding_proj_norm_type="layer" if pictures else None,
    )  # fmt: skip
    renderer = seeded(ShapERenderer, param_shapes=((8, 93), (8, 8), (8, 8), (8, 8)), d_latent=8, d_hidden=8, n_output=12, background=(0.1, 0.1, 0.1))
    # All rays of its 20 views at once: it leaves out those that do not fill a batch.
    renderer.decode_to_image = partial(renderer.decode_to_image, ray_batch_size=20 * SHAPE["frame_size"] ** 2, n_coarse_samples=4, n_fine_samples=8)
    scheduler = diffusers.HeunDiscreteScheduler(
        beta_schedule="exp", num_train_timesteps=1024, prediction_type="sample", use_karras_sigmas=True, clip_sample=True, clip_sample_range=1.0
    )
    parts = {"prior": prior, "shap_e_renderer": renderer, "scheduler": scheduler}
    if not pictures:
        return cls(**parts, **clip_parts(projected=True))
    encoder = clip_vision(width=CLIP_WIDTH, size=16, patch=8, projected=False)
    return cls(**parts, image_encoder=encoder, image_processor=transformers.CLIPImageProcessor(crop_size=16, size=16))


REPEATED = {"one_sample": True, "remark": "its decoder repeats the prompts as often as there are embeddings"}
SHAPE = {"num_inference_steps": 2, "guidance_scale": 3.0, "frame_size": 4}

CASES: dict[str, list[Case]] = {
    "StableCascadePriorPipeline": [Case(lambda: diffusers.StableCascadePriorPipeline(**cascade_prior(), resolution_multiple=16), PRIOR)],
    "StableCascadeDecoderPipeline": [
        Case(
            lambda: diffusers.StableCascadeDecoderPipeline(**cascade_decoder(), latent_dim_scale=4.0),
            {"num_inference_steps": 4, "guidance_scale": 3.0},
            {"image_embeddings": torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0))},
        )
    ],
    "StableCascadeCombinedPipeline": [
        Case(
            lambda: diffusers.StableCascadeCombinedPipeline(**cascade_decoder(), **cascade_prior("prior_")),
            {
                "height": 128, "width": 128, "num_inference_steps": 3, "prior_num_inference_steps": 3, "prior_guidance_scale": 3.0,
                "decoder_guidance_scale": 3.0,
            },
        )
    ],
    "WuerstchenPriorPipeline": [Case(lambda: diffusers.WuerstchenPriorPipeline(**wuerstchen_prior()), {**PRIOR, "height": 128, "width": 128})],
    "WuerstchenDecoderPipeline": [
        Case(
            lambda: diffusers.WuerstchenDecoderPipeline(**wuerstchen_decoder(), latent_dim_scale=4.0),
            {"num_inference_steps": 4, "guidance_scale": 3.0},
            {"image_embeddings": torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))},
            **REPEATED,
        )
    ],
    "WuerstchenCombinedPipeline": [
        Case(
            lambda: diffusers.WuerstchenCombinedPipeline(**wuerstchen_decoder(), **wuerstchen_prior("prior_")),
            {
                "height": 128, "width": 128, "num_inference_steps": 3, "prior_num_inference_steps": 3, "prior_guidance_scale": 3.0,
                "decoder_guidance_scale": 3.0,
            },
            **REPEATED,
        )
    ],
    "UnCLIPPipeline": [Case(unclip, {**UNCLIP, "prior_num_inference_steps": 3})],
    "UnCLIPImageVariationPipeline": [Case(unclip_variation, UNCLIP, {"image": two_pictures()}, prompts=None)],
    "ShapEPipeline": [Case(lambda: shap_e(diffusers.ShapEPipeline), SHAPE)],
    "ShapEImg2ImgPipeline": [Case(lambda: shap_e(diffusers.ShapEImg2ImgPipeline), SHAPE, {"image": [photograph(), photograph().flip(-1)]}, prompts=None)],
}  # fmt: skip

ABSENT: dict[str, str] = {
    "AmusedPipeline": "its samples are tokens, so that no step has a density of a Gaussian",
    "AmusedImg2ImgPipeline": "its samples are tokens, so that no step has a density of a Gaussian",
    "AmusedInpaintPipeline": "its samples are tokens, so that no step has a density of a Gaussian",
    "VQDiffusionPipeline": "its samples are tokens, so that no step has a density of a Gaussian",
    "LLaDA2Pipeline": "it writes text: its samples are tokens",
    "DiffusionGemmaPipeline": "it writes text: its samples are tokens",
    "RFD4ProteinaPipeline": "it makes proteins, from molecular features in the place of prompts",
}
