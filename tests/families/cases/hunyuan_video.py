"""HunyuanVideo, its FramePack, and HunyuanVideo 1.5."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers

from ..case import Case
from ..parts import CLIP_WIDTH, LANGUAGE_MODEL, LATENT_CHANNELS, TEXT_WIDTH, clip_parts, gemma_tokenizer, seeded, shifted_flow
from ..video_parts import picture, siglip_parts, two_pictures
from ..vision_language import qwen2_5_vl, vision_tokenizer

VIDEO = {
    "height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 4, "max_sequence_length": 32, "prompt_template": {"template": "{}", "crop_start": 0},
}  # fmt: skip
# Distilled guidance is an input of the model; this one asks it twice.
GUIDED = {**VIDEO, "true_cfg_scale": 3.0, "negative_prompt": "blurry"}
TRANSFORMER = {
    "in_channels": LATENT_CHANNELS, "out_channels": LATENT_CHANNELS, "num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 1,
    "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": 1, "text_embed_dim": TEXT_WIDTH, "pooled_projection_dim": CLIP_WIDTH,
    "rope_axes_dim": (2, 4, 4),
}  # fmt: skip


def video_vae(**config: Any) -> torch.nn.Module:
    """As small as its four levels allow: an eighth of the size, a quarter of the frames after the first."""
    return seeded(
        diffusers.AutoencoderKLHunyuanVideo, latent_channels=LATENT_CHANNELS, down_block_types=["HunyuanVideoDownBlock3D"] * 4,
        up_block_types=["HunyuanVideoUpBlock3D"] * 4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4, **config,
    )  # fmt: skip


def llama_parts() -> dict[str, Any]:
    tokenizer = gemma_tokenizer()
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, **LANGUAGE_MODEL)
    return {"tokenizer": tokenizer, "text_encoder": seeded(transformers.LlamaModel, config)}


def hunyuan(cls: type, denoiser: type = diffusers.HunyuanVideoTransformer3DModel, parts: dict[str, Any] | None = None, **config: Any):
    transformer = seeded(denoiser, **{**TRANSFORMER, "guidance_embeds": True, **config})
    text = parts or llama_parts()
    return cls(transformer=transformer, vae=video_vae(), scheduler=shifted_flow(shift=7.0), **clip_parts("_2"), **text)


def llava_parts() -> dict[str, Any]:
    """A language model that reads the picture too, in place of a token for each of its parts."""
    tokenizer = gemma_tokenizer()
    tokenizer.add_tokens(["<image>", "<|end_header_id|>", "<|eot_id|>"], special_tokens=True)
    text = transformers.LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, **LANGUAGE_MODEL)
    vision = transformers.CLIPVisionConfig(
        hidden_size=8, intermediate_size=16, projection_dim=8, num_attention_heads=2, num_hidden_layers=2, image_size=16, patch_size=8
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, pad_token_id=0, image_token_index=tokenizer.convert_tokens_to_ids("<image>"))
    processor = transformers.CLIPImageProcessor(crop_size=16, size=16)
    return {"tokenizer": tokenizer, "text_encoder": seeded(transformers.LlavaForConditionalGeneration, config), "image_processor": processor}


def framepack():
    parts = {**llama_parts(), **siglip_parts()}
    return hunyuan(
        diffusers.HunyuanVideoFramepackPipeline, diffusers.HunyuanVideoFramepackTransformer3DModel, parts, patch_size=2, has_image_proj=True,
        image_proj_dim=16, has_clean_x_embedder=True,
    )  # fmt: skip


def hunyuan_1_5(cls: type = diffusers.HunyuanVideo15Pipeline, parts: dict[str, Any] | None = None):
    transformer = seeded(
        diffusers.HunyuanVideo15Transformer3DModel, in_channels=2 * LATENT_CHANNELS + 1, out_channels=LATENT_CHANNELS, num_attention_heads=2,
        attention_head_dim=8, num_layers=1, num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=TEXT_WIDTH, text_embed_2_dim=TEXT_WIDTH,
        image_embed_dim=16, rope_axes_dim=(2, 2, 4), target_size=16, task_type="i2v" if parts else "t2v",
    )  # fmt: skip
    vae = seeded(
        diffusers.AutoencoderKLHunyuanVideo15, latent_channels=LATENT_CHANNELS, block_out_channels=(16, 16), layers_per_block=1,
        spatial_compression_ratio=4, temporal_compression_ratio=2, downsample_match_channel=False, upsample_match_channel=False,
    )  # fmt: skip
    text = {"tokenizer": vision_tokenizer(), "text_encoder": qwen2_5_vl().model.language_model}
    text |= {"tokenizer_2": transformers.ByT5Tokenizer(), "text_encoder_2": seeded(transformers.T5EncoderModel, transformers.T5Config(**BYTES))}
    pipeline = cls(
        transformer=transformer, vae=vae, scheduler=shifted_flow(shift=7.0), guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.0), **text,
        **(parts or {}),
    )  # fmt: skip
    # A short text around the prompts, and room for as much: its own has 1000 tokens, which are most of the time.
    pipeline.system_message, pipeline.prompt_template_encode_start_idx = "Draw.", 8
    pipeline.tokenizer_max_length, pipeline.tokenizer_2_max_length = 96, 32
    return pipeline


BYTES = {"vocab_size": 384, "d_model": TEXT_WIDTH, "d_kv": 8, "d_ff": 32, "num_heads": 4, "num_layers": 1, "dropout_rate": 0.0}
END = "<|end_header_id|>"
LLAVA = {"template": f"{END}<image>D.{END}{{}}<|eot_id|>{END}__", "crop_start": 5, "image_emb_len": 4, "image_emb_start": 1, "image_emb_end": 5}
ALONE = {"one_sample": True, "remark": "its autoencoder's mask takes one video at a time"}

CASES: dict[str, list[Case]] = {
    "HunyuanVideoPipeline": [Case(lambda: hunyuan(diffusers.HunyuanVideoPipeline), GUIDED)],
    "HunyuanSkyreelsImageToVideoPipeline": [
        Case(
            lambda: hunyuan(diffusers.HunyuanSkyreelsImageToVideoPipeline, in_channels=2 * LATENT_CHANNELS),
            GUIDED,
            {"image": two_pictures()},
        )
    ],
    "HunyuanVideoImageToVideoPipeline": [
        Case(
            lambda: hunyuan(
                diffusers.HunyuanVideoImageToVideoPipeline, parts=llava_parts(), in_channels=2 * LATENT_CHANNELS + 1, guidance_embeds=False,
                image_condition_type="latent_concat",
            ),
            {**GUIDED, "num_frames": 9, "prompt_template": LLAVA},
            {"image": two_pictures()},
        )
    ],
    "HunyuanVideoFramepackPipeline": [
        Case(framepack, {**GUIDED, "height": 32, "width": 32, "num_frames": 9, "latent_window_size": 3, "image": picture(32)}, one_sample=True)
    ],
    "HunyuanVideo15Pipeline": [Case(hunyuan_1_5, {"height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 4}, **ALONE)],
    "HunyuanVideo15ImageToVideoPipeline": [
        Case(
            lambda: hunyuan_1_5(diffusers.HunyuanVideo15ImageToVideoPipeline, siglip_parts()),
            {"num_frames": 5, "num_inference_steps": 4, "image": picture()},
            **ALONE,
        )
    ],
}  # fmt: skip

ABSENT: dict[str, str] = {}
