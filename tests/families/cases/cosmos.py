"""Cosmos 1, 2, 2.5 and 3: worlds from text, pictures and videos."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from ..case import Case
from ..parts import LANGUAGE_MODEL, LATENT_CHANNELS, TEXT_WIDTH, qwen_tokenizer, seeded, t5_parts
from ..video_parts import multistep_flow, two_pictures
from ..vision_language import qwen2_5_vl, vision_tokenizer
from .wan import wan_vae

PICTURE = {"height": 32, "width": 32, "num_inference_steps": 4, "guidance_scale": 3.0, "max_sequence_length": 32}
VIDEO = {**PICTURE, "num_frames": 5}
TRANSFORMER = {
    "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "mlp_ratio": 2, "adaln_lora_dim": 4, "max_size": (4, 32, 32),
    "patch_size": (1, 2, 2), "rope_scale": (2.0, 1.0, 1.0), "extra_pos_embed_type": "learnable",
}  # fmt: skip
# A mask of what the picture does not fill, which would be resized by torchvision.
PADDING = {"concat_padding_mask": False}


class NothingToCheck(diffusers.ModelMixin, diffusers.ConfigMixin):
    """In the place of the guardrail, whose models are large."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: Any) -> Any:
        return frames


def denoiser(channels: int, **config: Any) -> torch.nn.Module:
    fields = {**TRANSFORMER, **PADDING, "in_channels": channels, "out_channels": LATENT_CHANNELS, "text_embed_dim": TEXT_WIDTH, **config}
    return seeded(diffusers.CosmosTransformer3DModel, **fields)


def cosmos_vae() -> torch.nn.Module:
    return seeded(
        diffusers.AutoencoderKLCosmos, latent_channels=LATENT_CHANNELS, encoder_block_out_channels=(8,) * 4, decode_block_out_channels=(8,) * 4,
        attention_resolutions=(8,), resolution=64, num_layers=1, patch_size=4, spatial_compression_ratio=4, temporal_compression_ratio=4,
    )  # fmt: skip


def cosmos_1(cls: type, channels: int):
    """In the space of EDM."""
    scheduler = diffusers.EDMEulerScheduler(
        sigma_min=0.002, sigma_max=80, sigma_data=0.5, sigma_schedule="karras", prediction_type="epsilon", rho=7.0, final_sigmas_type="sigma_min"
    )
    return cls(transformer=denoiser(channels), vae=cosmos_vae(), scheduler=scheduler, safety_checker=NothingToCheck(), **t5_parts())


def cosmos_2(cls: type, channels: int):
    """A flow's scheduler that is given EDM's noise levels."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    return cls(transformer=denoiser(channels), vae=wan_vae(), scheduler=scheduler, safety_checker=NothingToCheck(), **t5_parts())


def cosmos_2_5(cls: type, **components: Any):
    parts = {
        "transformer": denoiser(LATENT_CHANNELS + 1, **READS), "tokenizer": vision_tokenizer(), "text_encoder": qwen2_5_vl(), "vae": wan_vae(),
        "scheduler": multistep_flow(flow_shift=5.0), "safety_checker": NothingToCheck(), **components,
    }  # fmt: skip
    return cls(**parts)


def omni():
    """A language model and a denoiser in one."""
    tokenizer = qwen_tokenizer()
    transformer = seeded(
        diffusers.Cosmos3OmniTransformer, head_dim=12, hidden_act="relu2", hidden_size=12, intermediate_size=16, latent_channel=LATENT_CHANNELS,
        latent_patch_size=1, num_attention_heads=1, num_hidden_layers=1, num_key_value_heads=1, patch_latent_dim=LATENT_CHANNELS,
        qk_norm_for_text=False, rope_axes_dim=[2, 2, 2], vocab_size=len(tokenizer) + 16,
    )  # fmt: skip
    return diffusers.Cosmos3OmniPipeline(
        transformer=transformer, text_tokenizer=tokenizer, vae=wan_vae(), scheduler=multistep_flow(), enable_safety_checker=False
    )


# The hidden states of all layers, one behind another, are what the model reads.
STATES = (LANGUAGE_MODEL["num_hidden_layers"]) * TEXT_WIDTH
READS = {"use_crossattn_projection": True, "crossattn_proj_in_channels": STATES, "encoder_hidden_states_channels": TEXT_WIDTH}
OMNI = {
    "height": 16, "width": 16, "num_frames": 1, "num_inference_steps": 4, "guidance_scale": 3.0, "use_system_prompt": False,
    "add_resolution_template": False, "add_duration_template": False,
}  # fmt: skip

CASES: dict[str, list[Case]] = {
    "CosmosTextToWorldPipeline": [Case(lambda: cosmos_1(diffusers.CosmosTextToWorldPipeline, LATENT_CHANNELS), {**VIDEO, "num_frames": 9})],
    "CosmosVideoToWorldPipeline": [
        Case(lambda: cosmos_1(diffusers.CosmosVideoToWorldPipeline, LATENT_CHANNELS + 1), {**VIDEO, "num_frames": 9}, {"image": two_pictures(32)})
    ],
    "Cosmos2TextToImagePipeline": [Case(lambda: cosmos_2(diffusers.Cosmos2TextToImagePipeline, LATENT_CHANNELS), PICTURE)],
    "Cosmos2VideoToWorldPipeline": [
        Case(lambda: cosmos_2(diffusers.Cosmos2VideoToWorldPipeline, LATENT_CHANNELS + 1), {**VIDEO, "num_frames": 9}, {"image": two_pictures(32)})
    ],
    "Cosmos2_5_PredictBasePipeline": [
        Case(
            lambda: cosmos_2_5(diffusers.Cosmos2_5_PredictBasePipeline),
            {**VIDEO, "max_sequence_length": 512},
            remark="pictures and videos as inputs need torchvision",
        )
    ],
    "Cosmos3OmniPipeline": [Case(omni, OMNI, one_sample=True)],
}

ABSENT: dict[str, str] = {"Cosmos2_5_TransferPipeline": "its controlnet resizes masks by torchvision"}
