"""Modular pipelines of videos with sound, and of sound: LTX-2, LTX-2.5, Echo, MiniMax-H3, MiniMax-Music 3."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers

from ..case import Case
from ..modular_parts import modular
from ..parts import LATENT_CHANNELS, TEXT_WIDTH, qwen3, qwen_tokenizer, seeded, shifted_flow
from ..video_parts import two_pictures
from ..vision_language import qwen3_vl, vision_processor, vision_tokenizer
from .ltx2 import diffusion_decode, ltx2

COMPRESSED = 8


def ltx_2():
    return modular(diffusers.LTX2ModularPipeline, ltx2())


def deep_vae():
    """Compresses as the diffusion decoder takes it: a sixteenth of the size, an eighth of the frames after the first."""
    blocks = 3
    return seeded(
        diffusers.AutoencoderKLLTX2Video, latent_channels=COMPRESSED, block_out_channels=(8,) * blocks, down_block_types=("LTX2VideoDownBlock3D",) * blocks,
        decoder_block_out_channels=(8,) * blocks, layers_per_block=(1,) * (blocks + 1), decoder_layers_per_block=(1,) * (blocks + 1),
        spatio_temporal_scaling=(True,) * blocks, decoder_spatio_temporal_scaling=(True,) * blocks, decoder_inject_noise=(False,) * (blocks + 1),
        downsample_type=("spatiotemporal",) * blocks, upsample_residual=(False,) * blocks, upsample_factor=(1,) * blocks, patch_size=2,
    )  # fmt: skip


def ltx_2_5():
    """Its videos are decoded by diffusion."""
    source = ltx2(transformer={"in_channels": COMPRESSED, "out_channels": COMPRESSED})
    return modular(diffusers.LTX25ModularPipeline, source, vae=deep_vae(), diffusion_decoder=diffusion_decode().diffusion_decoder)


def echo():
    return modular(diffusers.EchoModularPipeline, ltx2())


def minimax_h3():
    """Its text encoder is read at its 51st layer, and its shortest video has 124 frames."""
    transformer = seeded(
        diffusers.MiniMaxH3Transformer3DModel, num_attention_heads=2, attention_head_dim=16, hidden_size=24, num_layers=1, num_refiner_layers=1, ffn_dim=32,
        in_channels=LATENT_CHANNELS, audio_in_channels=8, text_dim=TEXT_WIDTH, freq_dim=8, time_embed_hidden_dim=24, time_embed_dim=16, rope_freq_dim=2,
    )  # fmt: skip
    vae = seeded(
        diffusers.AutoencoderKLMiniMaxH3, latent_channels=LATENT_CHANNELS, block_out_channels=(8, 16), layers_per_block=1,
        spatial_downsample_factors=(2, 2), temporal_downsample_factors=(2, 2), norm_num_groups=8, decoder_num_layers=1, decoder_num_attention_heads=2,
        decoder_attention_head_dim=8, decoder_num_register_tokens=2, decoder_ffn_mult=2, latents_mean=(0.1,) * LATENT_CHANNELS,
        latents_std=(1.5,) * LATENT_CHANNELS,
    )  # fmt: skip
    audio_vae = seeded(
        diffusers.AutoencoderKLMiniMaxH3Audio, encoder_dim=4, encoder_rates=(2, 2), latent_dim=32, latent_channels=8, num_attention_heads=2, decoder_dim=16,
        decoder_rates=(2, 2), decoder_kernel_sizes=(4, 4), resblock_kernel_sizes=(3,), resblock_dilation_sizes=((1, 3),), latents_mean=[0.1] * 8,
        latents_std=[1.5] * 8,
    )  # fmt: skip
    parts: dict[str, Any] = {"transformer": transformer, "vae": vae, "audio_vae": audio_vae, "tokenizer": vision_tokenizer()}
    parts |= {"text_encoder": qwen3_vl(num_hidden_layers=51), "processor": vision_processor(transformers.Qwen3VLProcessor)}
    schedulers = {"scheduler": diffusers.MiniMaxH3Scheduler(shift=12.0), "audio_scheduler": diffusers.MiniMaxH3Scheduler(shift=3.0)}
    return modular(diffusers.MiniMaxH3ModularPipeline, {**parts, **schedulers})


def minimax_music_3():
    """A language model, with the vocabulary of the published one, writes what the sound is made from."""
    width, codebooks = 16, 3
    language = qwen3(transformers.Qwen3ForCausalLM, vocab_size=168064, hidden_size=width, tie_word_embeddings=True)
    depth = seeded(
        diffusers.MiniMaxMusic3RVQDepthDecoder, hidden_size=width, num_layers=1, num_attention_heads=2, intermediate_size=16, audio_vocab_size=64,
        num_codebooks=codebooks,
    )  # fmt: skip
    condition = seeded(
        diffusers.MiniMaxMusic3ConditionEncoder, condition_hidden_dim=width, num_condition_layers=codebooks, out_dim=16, output_sampling_rate=400,
        output_hop_length=8,
    )  # fmt: skip
    transformer = seeded(
        diffusers.MiniMaxMusic3Transformer1DModel, in_channels=8, condition_dim=16, num_layers=1, num_attention_heads=2, attention_head_dim=8,
        ff_inner_dim=32, rotary_dim=4, fourier_embedding_dim=8,
    )  # fmt: skip
    vocoder = seeded(
        diffusers.MiniMaxMusic3Vocoder, latent_channels=8, decoder_input_dim=8, decoder_hidden_dim=16, upsampling_ratios=(4, 2), sampling_rate=400,
    )  # fmt: skip
    parts = {"tokenizer": qwen_tokenizer(), "language_model": language, "rvq_depth_decoder": depth, "condition_encoder": condition}
    return modular(diffusers.MiniMaxMusic3ModularPipeline, {**parts, "transformer": transformer, "vocoder": vocoder, "scheduler": shifted_flow(shift=1.0)})


VIDEO = {"height": 32, "width": 32, "num_frames": 5, "frame_rate": 25.0, "num_inference_steps": 4, "max_sequence_length": 32}
GUIDED = {**VIDEO, "guidance_scale": 3.0, "negative_prompt": "blurry", "spatio_temporal_guidance_blocks": [0]}
SHORTEST = {"height": 16, "width": 16, "num_frames": 124, "num_inference_steps": 2}
SONG = {"lyrics": "[verse]\nhello", "audio_duration": 0.4, "num_inference_steps": 4, "guidance_scale": 1.7}

CASES: dict[str, list[Case]] = {
    "LTX2ModularPipeline": [
        Case(ltx_2, GUIDED),
        Case(ltx_2, {**GUIDED, "image_crf": 0}, {"image": two_pictures(32)}, variant="from images"),
    ],
    "LTX25ModularPipeline": [Case(ltx_2_5, {**GUIDED, "num_frames": 9}, remark="the FlexAttention of its decoder has no gradient on the CPU")],
    "EchoModularPipeline": [Case(echo, {name: value for name, value in VIDEO.items() if name != "num_inference_steps"})],
    "MiniMaxH3ModularPipeline": [Case(minimax_h3, SHORTEST, one_sample=True)],
    "MiniMaxMusic3ModularPipeline": [Case(minimax_music_3, SONG, one_sample=True)],
}

ABSENT: dict[str, str] = {}
