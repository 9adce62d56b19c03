"""Videos of other families: EasyAnimate, Motif-Video, Sana-Video."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers

from ..case import Case
from ..parts import LANGUAGE_MODEL, LATENT_CHANNELS, TEXT_WIDTH, gemma_parts, gemma_tokenizer, photograph, seeded, shifted_flow
from ..video_parts import picture
from ..vision_language import vision_tokenizer
from .wan import wan_vae

NEGATIVE = {"negative_prompt": ["blurry", "blurry"]}
VIDEO = {"height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 4, "guidance_scale": 3.0}


# --- EasyAnimate -------------------------------------------------------------------------------------------------------


def qwen2_vl_parts() -> dict[str, Any]:
    tokenizer = vision_tokenizer()
    text = {**LANGUAGE_MODEL, "vocab_size": len(tokenizer), "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": TEXT_WIDTH, "num_heads": 2, "mlp_ratio": 1}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision)
    return {"tokenizer": tokenizer, "text_encoder": seeded(transformers.Qwen2VLForConditionalGeneration, config)}


def easyanimate(cls: type, channels: int = LATENT_CHANNELS):
    transformer = seeded(
        diffusers.EasyAnimateTransformer3DModel, num_attention_heads=2, attention_head_dim=16, in_channels=channels, out_channels=LATENT_CHANNELS,
        time_embed_dim=8, text_embed_dim=TEXT_WIDTH, num_layers=1, sample_width=16, sample_height=16, patch_size=2,
        resize_inpaint_mask_directly=False,
    )  # fmt: skip
    vae = seeded(
        diffusers.AutoencoderKLMagvit, down_block_types=("SpatialDownBlock3D", *("SpatialTemporalDownBlock3D",) * 3),
        up_block_types=("SpatialUpBlock3D", *("SpatialTemporalUpBlock3D",) * 3), block_out_channels=(8,) * 4, latent_channels=LATENT_CHANNELS,
        layers_per_block=1, norm_num_groups=2, spatial_group_norm=False,
    )  # fmt: skip
    return cls(transformer=transformer, vae=vae, scheduler=shifted_flow(shift=5.0), **qwen2_vl_parts())


# --- Motif-Video -------------------------------------------------------------------------------------------------------


def motif(cls: type, pictures: bool):
    tokenizer = gemma_tokenizer()
    text = transformers.T5Gemma2TextConfig(
        hidden_size=TEXT_WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=len(tokenizer), max_position_embeddings=128,
        head_dim=16, num_key_value_heads=2, dropout_rate=0.0,
    )  # fmt: skip
    vision = transformers.SiglipVisionConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8)
    config = transformers.T5Gemma2EncoderConfig(text_config=text, vision_config=vision)
    transformer = seeded(
        diffusers.MotifVideoTransformer3DModel, in_channels=2 * LATENT_CHANNELS + 1, out_channels=LATENT_CHANNELS, num_attention_heads=2,
        attention_head_dim=12, num_layers=1, num_single_layers=1, patch_size=1, text_embed_dim=TEXT_WIDTH, rope_axes_dim=(4, 4, 4),
        **({"image_embed_dim": 16} if pictures else {}),
    )  # fmt: skip
    processor = transformers.SiglipImageProcessor(size={"height": 16, "width": 16}) if pictures else None
    return cls(
        transformer=transformer, vae=wan_vae(), scheduler=shifted_flow(shift=7.0), text_encoder=seeded(transformers.T5Gemma2Encoder, config),
        tokenizer=tokenizer, feature_extractor=processor, guider=diffusers.AdaptiveProjectedGuidance(guidance_scale=3.0),
    )  # fmt: skip


MOTIF = {"height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 4, "max_sequence_length": 32, "negative_prompt": "blurry"}


# --- Sana-Video --------------------------------------------------------------------------------------------------------


def sana_video(cls: type, scheduler: Any):
    transformer = seeded(
        diffusers.SanaVideoTransformer3DModel, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, num_attention_heads=2, attention_head_dim=12,
        num_layers=1, num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=TEXT_WIDTH, sample_size=8,
        rope_max_seq_len=32,
    )  # fmt: skip
    return cls(transformer=transformer, vae=wan_vae(), scheduler=scheduler, **gemma_parts())


SANA = {
    "height": 32, "width": 32, "frames": 5, "num_inference_steps": 4, "guidance_scale": 3.0, "max_sequence_length": 32, "use_resolution_binning": False,
    "complex_human_instruction": None,
}  # fmt: skip
DPM = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 8.0}
FRAMES = torch.cat([photograph(), photograph().flip(-1)])[:, :, None].repeat(1, 1, 5, 1, 1)

CASES: dict[str, list[Case]] = {
    "EasyAnimatePipeline": [Case(lambda: easyanimate(diffusers.EasyAnimatePipeline), VIDEO, NEGATIVE)],
    "EasyAnimateInpaintPipeline": [
        Case(
            lambda: easyanimate(diffusers.EasyAnimateInpaintPipeline, 3 * LATENT_CHANNELS),
            VIDEO,
            {**NEGATIVE, "video": FRAMES, "mask_video": FRAMES[:, :1]},
            one_sample=True,
            remark="it draws noise for the known frames from one generator, and takes no list of them",
        )
    ],
    "MotifVideoPipeline": [Case(lambda: motif(diffusers.MotifVideoPipeline, False), MOTIF)],
    "MotifVideoImage2VideoPipeline": [Case(lambda: motif(diffusers.MotifVideoImage2VideoPipeline, True), {**MOTIF, "image": picture()}, one_sample=True)],
    "SanaVideoPipeline": [Case(lambda: sana_video(diffusers.SanaVideoPipeline, diffusers.DPMSolverMultistepScheduler(**DPM)), SANA)],
    "SanaImageToVideoPipeline": [Case(lambda: sana_video(diffusers.SanaImageToVideoPipeline, shifted_flow(shift=8.0)), {**SANA, "image": picture(32)})],
}

ABSENT: dict[str, str] = {"EasyAnimateControlPipeline": "its call fails in diffusers: it hands encode_prompt an argument, text_encoder_index, that is gone"}
