"""Stock pipelines whose schedulers walk in sigma space, with tiny random weights, and how to call them for two samples."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import PIL.Image
import torch
import transformers
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers import transformer_cosmos
from torch.nn import functional as F

from tests.families.parts import (
    CLIP_WIDTH,
    LATENT_CHANNELS,
    STABLE_DIFFUSION_BETAS,
    TEXT_WIDTH,
    clip_parts,
    image_vae,
    photograph,
    quiet,
    seeded,
    t5_parts,
    unet,
)

SVD_EULER = {
    **STABLE_DIFFUSION_BETAS, "prediction_type": "v_prediction", "sigma_max": 700.0, "sigma_min": 0.002, "steps_offset": 1,
    "timestep_spacing": "leading", "timestep_type": "continuous", "use_karras_sigmas": True,
}  # fmt: skip
COSMOS_EDM = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "prediction_type": "epsilon", "final_sigmas_type": "sigma_min"}


if not hasattr(transformer_cosmos, "transforms"):
    # Cosmos takes one function of torchvision, to scale the mask of its padding, which the tests do without.
    _resize = SimpleNamespace(resize=lambda mask, size, interpolation: F.interpolate(mask, size))
    transformer_cosmos.transforms = SimpleNamespace(functional=_resize, InterpolationMode=SimpleNamespace(NEAREST=None))


class _Approval(ModelMixin, ConfigMixin):
    """A guardrail that lets everything pass."""

    def __init__(self):
        super().__init__()
        self.register_buffer("place", torch.zeros(1), persistent=False)

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames):
        return frames


def sdxl(scheduler=None):
    scheduler = scheduler or diffusers.EulerDiscreteScheduler(**STABLE_DIFFUSION_BETAS, use_karras_sigmas=True)
    embedding = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": CLIP_WIDTH + 6 * 8}
    denoiser = unet(cross_attention_dim=2 * CLIP_WIDTH, transformer_layers_per_block=(1, 1), use_linear_projection=True, **embedding)
    parts = {**clip_parts(), **clip_parts("_2", projected=True)}
    pipeline = diffusers.StableDiffusionXLPipeline(unet=denoiser, vae=image_vae(), scheduler=scheduler, add_watermarker=False, **parts)
    return quiet(pipeline)


def stable_video_diffusion():
    denoiser = seeded(
        diffusers.UNetSpatioTemporalConditionModel, block_out_channels=(32, 64), layers_per_block=1, sample_size=8, in_channels=8, out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"), cross_attention_dim=16, num_attention_heads=2,
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), projection_class_embeddings_input_dim=24, addition_time_embed_dim=8,
    )  # fmt: skip
    vae = seeded(
        diffusers.AutoencoderKLTemporalDecoder, block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=LATENT_CHANNELS
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, projection_dim=16, num_hidden_layers=1, num_attention_heads=2, image_size=224, intermediate_size=16, patch_size=56
    )  # fmt: skip
    return quiet(
        diffusers.StableVideoDiffusionPipeline(
            unet=denoiser,
            vae=vae,
            image_encoder=seeded(transformers.CLIPVisionModelWithProjection, vision),
            feature_extractor=transformers.CLIPImageProcessor(crop_size=224, size=224),
            scheduler=diffusers.EulerDiscreteScheduler(**SVD_EULER),
        )  # fmt: skip
    )


def _cosmos_transformer(channels: int, conditions: int = 0):
    return seeded(
        diffusers.CosmosTransformer3DModel, in_channels=channels + conditions, out_channels=channels, num_attention_heads=2, attention_head_dim=16,
        num_layers=1, mlp_ratio=2, text_embed_dim=TEXT_WIDTH, adaln_lora_dim=4, max_size=(4, 32, 32), patch_size=(1, 2, 2),
        rope_scale=(2.0, 1.0, 1.0), concat_padding_mask=True, extra_pos_embed_type="learnable",
    )  # fmt: skip


def cosmos(cls: type = diffusers.CosmosTextToWorldPipeline, conditions: int = 0):
    vae = seeded(
        diffusers.AutoencoderKLCosmos, latent_channels=LATENT_CHANNELS, encoder_block_out_channels=(8,) * 4, decode_block_out_channels=(8,) * 4,
        attention_resolutions=(8,), resolution=64, num_layers=1, scaling_factor=1.0, spatial_compression_ratio=4, temporal_compression_ratio=4,
    )  # fmt: skip
    parts = {"transformer": _cosmos_transformer(LATENT_CHANNELS, conditions), "vae": vae, "scheduler": diffusers.EDMEulerScheduler(**COSMOS_EDM)}
    return quiet(cls(**parts, **t5_parts(), safety_checker=_Approval()))


def cosmos2():
    vae = seeded(
        diffusers.AutoencoderKLWan, base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )  # fmt: skip
    parts = {"transformer": _cosmos_transformer(16), "vae": vae, "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)}
    return quiet(diffusers.Cosmos2TextToImagePipeline(**parts, **t5_parts(), safety_checker=_Approval()))


PROMPTS = ["a cat", "a large red dog"]
_VIDEO = {"height": 32, "width": 32, "num_inference_steps": 4}
_COSMOS = {**_VIDEO, "guidance_scale": 3.0, "max_sequence_length": 16, "negative_prompt": "dull"}
_PICTURE = PIL.Image.fromarray((photograph(32)[0].permute(1, 2, 0) * 255).byte().numpy())
PICTURES = [_PICTURE, _PICTURE.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)]

# How each is built, its prompts, and what its calls get: all samples' arguments and each sample's own.
PIPELINES: dict[str, tuple[Any, list[str] | None, dict[str, Any], dict[str, list]]] = {
    "SDXL": (sdxl, PROMPTS, {"height": 16, "width": 16, "num_inference_steps": 4, "guidance_scale": 3.0}, {}),
    "SVD": (stable_video_diffusion, None, {**_VIDEO, "num_frames": 2, "decode_chunk_size": 2}, {"image": PICTURES}),
    "Cosmos": (cosmos, PROMPTS, {**_COSMOS, "num_frames": 9}, {}),
    "Cosmos2": (cosmos2, PROMPTS, _COSMOS, {}),
}
