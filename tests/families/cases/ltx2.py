"""LTX-2: videos with their sound, from text, pictures, references and keyframes; latents made larger, and decoded by diffusion."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers
from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from diffusers.pipelines.ltx2.pipeline_ltx2_hdr_lora import LTX2HDRReferenceCondition

from ..case import Case
from ..parts import LANGUAGE_MODEL, LATENT_CHANNELS, TEXT_WIDTH, gemma_tokenizer, photograph, seeded
from ..video_parts import two_pictures

VIDEO = {
    "height": 32, "width": 32, "num_frames": 5, "frame_rate": 25.0, "num_inference_steps": 4, "guidance_scale": 3.0, "max_sequence_length": 32,
    "stg_scale": 0.0, "modality_scale": 1.0, "guidance_rescale": 0.0, "audio_stg_scale": 0.0, "audio_modality_scale": 1.0, "audio_guidance_rescale": 0.0,
    "spatio_temporal_guidance_blocks": None,
}  # fmt: skip
LAYERS = 2


def gemma_3_parts() -> dict[str, Any]:
    tokenizer = gemma_tokenizer()
    text = {**LANGUAGE_MODEL, "vocab_size": len(tokenizer), "num_hidden_layers": LAYERS}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return {"tokenizer": tokenizer, "text_encoder": seeded(transformers.Gemma3ForConditionalGeneration, config)}


def connectors() -> torch.nn.Module:
    sides = {f"{side}_connector_{name}": value for side in ("video", "audio") for name, value in {
        "num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 1, "num_learnable_registers": None,
    }.items()}  # fmt: skip
    return seeded(
        diffusers.pipelines.ltx2.connectors.LTX2TextConnectors, caption_channels=TEXT_WIDTH, text_proj_in_factor=LAYERS + 1,
        connector_rope_base_seq_len=32, rope_double_precision=False, rope_type="split", **sides,
    )  # fmt: skip


def video_vae() -> torch.nn.Module:
    vae = seeded(
        diffusers.AutoencoderKLLTX2Video, latent_channels=LATENT_CHANNELS, block_out_channels=(8,), decoder_block_out_channels=(8,),
        layers_per_block=(1,), decoder_layers_per_block=(1, 1), spatio_temporal_scaling=(True,), decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False), downsample_type=("spatial",), upsample_residual=(False,), upsample_factor=(1,), patch_size=1,
        decoder_causal=False,
    )  # fmt: skip
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    return vae


def sound_parts() -> dict[str, Any]:
    audio_vae = seeded(
        diffusers.AutoencoderKLLTX2Audio, base_channels=4, output_channels=2, ch_mult=(1,), num_res_blocks=1, in_channels=2, resolution=32,
        latent_channels=2, mid_block_add_attention=False, mel_bins=8,
    )  # fmt: skip
    vocoder = seeded(
        diffusers.pipelines.ltx2.vocoder.LTX2Vocoder, in_channels=16, hidden_channels=16, out_channels=2, upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2], resnet_kernel_sizes=[3], resnet_dilations=[[1, 3, 5]], output_sampling_rate=16000,
    )  # fmt: skip
    return {"audio_vae": audio_vae, "vocoder": vocoder}


def ltx2(cls: type = diffusers.LTX2Pipeline, scheduler: Any = None, transformer: dict[str, Any] | None = None, **components: Any):
    denoiser = seeded(
        diffusers.LTX2VideoTransformer3DModel, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, num_attention_heads=2, attention_head_dim=8,
        cross_attention_dim=16, audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4,
        audio_cross_attention_dim=8, num_layers=1, caption_channels=TEXT_WIDTH, rope_double_precision=False, rope_type="split", **(transformer or {}),
    )  # fmt: skip
    scheduler = scheduler or diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1)
    return cls(transformer=denoiser, vae=video_vae(), scheduler=scheduler, connectors=connectors(), **sound_parts(), **gemma_3_parts(), **components)


def upsample():
    upsampler = seeded(LTX2LatentUpsamplerModel, in_channels=LATENT_CHANNELS, mid_channels=32, num_blocks_per_stage=1)
    return diffusers.LTX2LatentUpsamplePipeline(vae=video_vae(), latent_upsampler=upsampler)


def temporal_refine():
    upsampler = seeded(
        LTX2LatentUpsamplerModel, in_channels=LATENT_CHANNELS, mid_channels=32, num_blocks_per_stage=1, spatial_upsample=False, temporal_upsample=True
    )
    scheduler = diffusers.LTXEulerAncestralRFScheduler(eta=1.0)
    return ltx2(diffusers.LTX2DFRTemporalRefinePipeline, scheduler, KEYFRAMES, temporal_latent_upsampler=upsampler)


def diffusion_decode():
    decoder = seeded(
        diffusers.LTX2VideoDiffusionDecoderModel, latent_channels=8, patch_size=2, decoder_head_dim=16, decoder_stage_channels=(32, 16, 16, 16, 16),
        decoder_stage_depths=(1, 1, 1, 1, 1), decoder_stage_kernels=((1, 1, 1), (1, 3, 3), (1, 3, 3), (1, 3, 3)),
        decoder_upsample_strides=((1, 2, 2), (2, 1, 1), (2, 2, 2), (2, 2, 2)), decoder_upsample_channel_reductions=(2, 1, 1, 1),
        decoder_stage5_kernel=(1, 3, 3), decoder_t_emb_dim=32, spatial_compression_ratio=16, temporal_compression_ratio=8,
    )  # fmt: skip
    return diffusers.LTX2VideoDiffusionDecodePipeline(diffusion_decoder=decoder, scheduler=diffusers.FlowMatchEulerDiscreteScheduler())


def latents(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


KEYFRAMES = {"use_keyframes_abs_pos_embedding": True}
CONDITION = LTX2VideoCondition(frames=photograph(32), index=0, strength=1.0, crf=0)
REFERENCE = {
    "height": 32, "width": 32, "num_frames": 5, "frame_rate": 25.0, "num_inference_steps": 4, "guidance_scale": 3.0, "max_sequence_length": 32,
}  # fmt: skip
PASS = {"height": 32, "width": 32, "num_frames": 9, "frame_rate": 25.0, "sigmas": [1.0, 0.7, 0.4], "max_sequence_length": 32}

CASES: dict[str, list[Case]] = {
    "LTX2Pipeline": [Case(ltx2, VIDEO)],
    "LTX2ImageToVideoPipeline": [Case(lambda: ltx2(diffusers.LTX2ImageToVideoPipeline), {**VIDEO, "image_crf": 0}, {"image": two_pictures(32)})],
    "LTX2ConditionPipeline": [Case(lambda: ltx2(diffusers.LTX2ConditionPipeline), {**VIDEO, "conditions": CONDITION})],
    "LTX2InContextPipeline": [Case(lambda: ltx2(diffusers.LTX2InContextPipeline), {**REFERENCE, "conditions": CONDITION})],
    "LTX2HDRPipeline": [
        Case(
            lambda: ltx2(diffusers.LTX2HDRPipeline),
            {**REFERENCE, "reference_conditions": LTX2HDRReferenceCondition(frames=photograph(32), strength=1.0)},
        )
    ],
    "LTX2DFRPipeline": [Case(lambda: ltx2(diffusers.LTX2DFRPipeline, diffusers.FlowMatchEulerDiscreteScheduler(), KEYFRAMES), PASS)],
    "LTX2DFRTemporalRefinePipeline": [
        Case(
            temporal_refine,
            {
                **PASS, "latents": latents(1, 4, 5, 16, 16), "keyframes_latents": latents(1, 4, 1, 16, 16), "keyframe_positions": [8],
                "audio_latents": latents(1, 2, 9, 2),
            },
            one_sample=True,
        )
    ],
    "LTX2LatentUpsamplePipeline": [
        Case(upsample, {"height": 16, "width": 16, "num_frames": 5, "video": photograph(16).repeat(5, 1, 1, 1)}, prompts=None, one_sample=True)
    ],
    "LTX2VideoDiffusionDecodePipeline": [
        Case(diffusion_decode, {}, {"latents": latents(2, 8, 2, 2, 2)}, prompts=None)
    ],
}  # fmt: skip

ABSENT: dict[str, str] = {}
