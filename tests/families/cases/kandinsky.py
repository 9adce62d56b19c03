"""Kandinsky 2.1, 2.2 and 3: decoders of picture embeddings, their priors, and both in one pipeline."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP

from ..case import Case
from ..parts import CLIP_WIDTH, LATENT_CHANNELS, STABLE_DIFFUSION_BETAS, clip_parts, seeded, t5_parts, t5_tokenizer, unet
from ..video_parts import clip_vision_parts, two_pictures

SIZED = {"height": 16, "width": 16, "num_inference_steps": 4, "guidance_scale": 3.0}
SAME = {"num_inference_steps": 5, "strength": 0.8}
# Kandinsky's pictures are twice as large here as their latents, which the pipelines count as eight times.
BETAS = {**STABLE_DIFFUSION_BETAS, "beta_schedule": "linear"}


def movq(levels: int = 2) -> torch.nn.Module:
    down, up = ["DownEncoderBlock2D"] * (levels - 1), ["UpDecoderBlock2D"] * (levels - 1)
    return seeded(
        diffusers.VQModel, block_out_channels=[32] * levels, down_block_types=[*down, "AttnDownEncoderBlock2D"],
        up_block_types=["AttnUpDecoderBlock2D", *up], latent_channels=LATENT_CHANNELS, norm_num_groups=4, norm_type="spatial", num_vq_embeddings=12,
        vq_embed_dim=LATENT_CHANNELS,
    )  # fmt: skip


def decoder_unet(kind: str, projection: str, channels: int) -> torch.nn.Module:
    """It learns its variance: twice the channels."""
    return unet(
        in_channels=channels, out_channels=2 * LATENT_CHANNELS, addition_embed_type=kind, encoder_hid_dim=CLIP_WIDTH, encoder_hid_dim_type=projection,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", block_out_channels=(16, 32), attention_head_dim=4, resnet_time_scale_shift="scale_shift",
        cross_attention_dim=CLIP_WIDTH, sample_size=4, norm_num_groups=4,
    )  # fmt: skip


def prior_parts(prefix: str = "") -> dict[str, Any]:
    prior = seeded(diffusers.PriorTransformer, num_attention_heads=2, attention_head_dim=8, embedding_dim=CLIP_WIDTH, num_layers=1)
    prior.clip_std.data.fill_(1.0)  # zeros by themselves
    scheduler = diffusers.UnCLIPScheduler(
        variance_type="fixed_small_log", prediction_type="sample", num_train_timesteps=1000, clip_sample=True, clip_sample_range=10.0
    )
    parts = {"prior": prior, "scheduler": scheduler, **clip_parts(projected=True), **clip_vision_parts(width=CLIP_WIDTH, projection=CLIP_WIDTH)}
    return {f"{prefix}{name}": value for name, value in parts.items()}


def decoder_parts(channels: int = LATENT_CHANNELS) -> dict[str, Any]:
    """Of Kandinsky 2.1, which reads the prompt too."""
    config = MCLIPConfig(
        numDims=CLIP_WIDTH, transformerDimensions=CLIP_WIDTH, hidden_size=CLIP_WIDTH, intermediate_size=16, num_attention_heads=2,
        num_hidden_layers=2, vocab_size=len(t5_tokenizer()), max_position_embeddings=600,
    )  # fmt: skip
    return {
        "text_encoder": seeded(MultilingualCLIP, config),
        "tokenizer": t5_tokenizer(),
        "unet": decoder_unet("text_image", "text_image_proj", channels),
        "scheduler": diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        "movq": movq(),
    }


def decoder_parts_2_2(channels: int = LATENT_CHANNELS, kind: str = "image", levels: int = 2) -> dict[str, Any]:
    scheduler = diffusers.DDPMScheduler(**BETAS, clip_sample=True, clip_sample_range=2.0, variance_type="learned_range")
    return {"unet": decoder_unet(kind, "image_proj", channels), "scheduler": scheduler, "movq": movq(levels)}


def kandinsky(cls: type, channels: int = LATENT_CHANNELS):
    return cls(**decoder_parts(channels))


def kandinsky_2_2(cls: type, channels: int = LATENT_CHANNELS, **config: Any):
    return cls(**decoder_parts_2_2(channels, **config))


def combined(cls: type, channels: int = LATENT_CHANNELS):
    return cls(**decoder_parts(channels), **prior_parts("prior_"))


def combined_2_2(cls: type, channels: int = LATENT_CHANNELS):
    return cls(**decoder_parts_2_2(channels), **prior_parts("prior_"))


def kandinsky_3(cls: type):
    denoiser = seeded(
        diffusers.Kandinsky3UNet, in_channels=LATENT_CHANNELS, time_embedding_dim=4, groups=2, attention_head_dim=4, layers_per_block=3,
        block_out_channels=(16, 32), cross_attention_dim=4, encoder_hid_dim=32,
    )  # fmt: skip
    scheduler = diffusers.DDPMScheduler(**{**BETAS, "beta_schedule": "squaredcos_cap_v2"}, steps_offset=1)
    return cls(unet=denoiser, movq=movq(), scheduler=scheduler, **t5_parts())


def embeddings(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, CLIP_WIDTH, generator=generator) for _ in range(2)]


def hints(size: int) -> torch.Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(2))


EMBEDDINGS = {"image_embeds": embeddings(0), "negative_image_embeds": embeddings(1)}
PRIOR = {"num_inference_steps": 4, "guidance_scale": 3.0}
COMBINED = {**SIZED, "prior_num_inference_steps": 3}
MASKED = {"image": two_pictures(), "mask_image": [mask.convert("L") for mask in two_pictures()]}
# The picture that controls is made eight times smaller by the denoiser.
CONTROLLED = {**SIZED, "height": 64, "width": 64}
INPAINT = 2 * LATENT_CHANNELS + 1

CASES: dict[str, list[Case]] = {
    "KandinskyPipeline": [Case(lambda: kandinsky(diffusers.KandinskyPipeline), SIZED, EMBEDDINGS)],
    "KandinskyImg2ImgPipeline": [Case(lambda: kandinsky(diffusers.KandinskyImg2ImgPipeline), {**SIZED, **SAME}, {**EMBEDDINGS, "image": two_pictures()})],
    "KandinskyInpaintPipeline": [
        Case(
            lambda: kandinsky(diffusers.KandinskyInpaintPipeline, INPAINT),
            SIZED,
            {**EMBEDDINGS, **MASKED},
        )
    ],
    "KandinskyPriorPipeline": [Case(lambda: diffusers.KandinskyPriorPipeline(**prior_parts()), PRIOR)],
    "KandinskyCombinedPipeline": [Case(lambda: combined(diffusers.KandinskyCombinedPipeline), COMBINED)],
    "KandinskyImg2ImgCombinedPipeline": [Case(lambda: combined(diffusers.KandinskyImg2ImgCombinedPipeline), {**COMBINED, **SAME}, {"image": two_pictures()})],
    "KandinskyInpaintCombinedPipeline": [Case(lambda: combined(diffusers.KandinskyInpaintCombinedPipeline, INPAINT), COMBINED, MASKED)],
    "KandinskyV22Pipeline": [Case(lambda: kandinsky_2_2(diffusers.KandinskyV22Pipeline), SIZED, EMBEDDINGS, prompts=None)],
    "KandinskyV22Img2ImgPipeline": [
        Case(lambda: kandinsky_2_2(diffusers.KandinskyV22Img2ImgPipeline), {**SIZED, **SAME}, {**EMBEDDINGS, "image": two_pictures()}, prompts=None)
    ],
    "KandinskyV22InpaintPipeline": [
        Case(
            lambda: kandinsky_2_2(diffusers.KandinskyV22InpaintPipeline, INPAINT),
            SIZED,
            {**EMBEDDINGS, **MASKED},
            prompts=None,
        )
    ],
    "KandinskyV22ControlnetPipeline": [
        Case(
            lambda: kandinsky_2_2(diffusers.KandinskyV22ControlnetPipeline, 2 * LATENT_CHANNELS, kind="image_hint", levels=4),
            CONTROLLED,
            {**EMBEDDINGS, "hint": hints(64)},
            prompts=None,
        )
    ],
    "KandinskyV22ControlnetImg2ImgPipeline": [
        Case(
            lambda: kandinsky_2_2(diffusers.KandinskyV22ControlnetImg2ImgPipeline, 2 * LATENT_CHANNELS, kind="image_hint", levels=4),
            {**CONTROLLED, **SAME},
            {**EMBEDDINGS, "image": two_pictures(64), "hint": hints(64)},
            prompts=None,
        )
    ],
    "KandinskyV22PriorPipeline": [Case(lambda: diffusers.KandinskyV22PriorPipeline(**prior_parts()), PRIOR)],
    "KandinskyV22PriorEmb2EmbPipeline": [
        Case(lambda: diffusers.KandinskyV22PriorEmb2EmbPipeline(**prior_parts()), {**PRIOR, **SAME}, {"image": two_pictures()})
    ],
    "KandinskyV22CombinedPipeline": [Case(lambda: combined_2_2(diffusers.KandinskyV22CombinedPipeline), COMBINED)],
    "KandinskyV22Img2ImgCombinedPipeline": [
        Case(lambda: combined_2_2(diffusers.KandinskyV22Img2ImgCombinedPipeline), {**COMBINED, **SAME}, {"image": two_pictures()})
    ],
    "KandinskyV22InpaintCombinedPipeline": [Case(lambda: combined_2_2(diffusers.KandinskyV22InpaintCombinedPipeline, INPAINT), COMBINED, MASKED)],
    "Kandinsky3Pipeline": [Case(lambda: kandinsky_3(diffusers.Kandinsky3Pipeline), SIZED)],
    "Kandinsky3Img2ImgPipeline": [Case(lambda: kandinsky_3(diffusers.Kandinsky3Img2ImgPipeline), {**SAME, "guidance_scale": 3.0}, {"image": two_pictures()})],
}

ABSENT: dict[str, str] = {}
