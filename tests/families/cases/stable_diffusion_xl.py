"""Stable Diffusion XL, Kolors, and what is built around them."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel

from ..case import Case
from ..parts import CLIP_WIDTH, LATENT_CHANNELS, clip_parts, gemma_tokenizer, image_vae, masks, pictures, quiet, seeded, xl_scheduler, xl_unet

GUIDED = {"num_inference_steps": 4, "guidance_scale": 3.0}
SMALL = {"height": 16, "width": 16, **GUIDED}
EDIT = {"num_inference_steps": 5, "guidance_scale": 3.0, "strength": 0.8}


def xl_parts() -> dict[str, Any]:
    return {
        "unet": xl_unet(), "vae": image_vae(scaling_factor=0.13025), "scheduler": xl_scheduler(), **clip_parts(), **clip_parts("_2", projected=True),
    }  # fmt: skip


def stable_diffusion_xl(cls: type, **components: Any):
    """Any pipeline that has the parts of Stable Diffusion XL."""
    return quiet(cls(**{**xl_parts(), **components}))


class PositionedTokenizer(transformers.PreTrainedTokenizerFast):
    """Says the positions of its tokens as well, as ChatGLM's does."""

    def __call__(self, *args: Any, **kwargs: Any):
        encoded = super().__call__(*args, **kwargs)
        encoded["position_ids"] = (encoded["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        return encoded


def chat_glm_parts() -> dict[str, Any]:
    plain = gemma_tokenizer()
    names = {name: getattr(plain, name) for name in ("pad_token", "eos_token", "bos_token", "unk_token")}
    tokenizer = PositionedTokenizer(tokenizer_object=plain.backend_tokenizer, padding_side="left", model_max_length=256, **names)
    config = ChatGLMConfig(
        num_layers=2, padded_vocab_size=len(tokenizer), hidden_size=CLIP_WIDTH, ffn_hidden_size=16, kv_channels=8, num_attention_heads=2, seq_length=256,
        multi_query_attention=True, multi_query_group_num=2, add_qkv_bias=True, original_rope=True,
    )  # fmt: skip
    model = seeded(ChatGLMModel, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # allocated and left as the memory was, for a checkpoint to fill
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return {"tokenizer": tokenizer, "text_encoder": model}


def kolors(cls: type, **components: Any):
    denoiser = xl_unet(cross_attention_dim=CLIP_WIDTH)
    return quiet(cls(**{"unet": denoiser, "vae": image_vae(scaling_factor=0.13025), "scheduler": xl_scheduler(), **chat_glm_parts(), **components}))


INPAINT = {"image": pictures(), "mask_image": masks()}
CASES: dict[str, list[Case]] = {
    "StableDiffusionXLPipeline": [Case(lambda: stable_diffusion_xl(diffusers.StableDiffusionXLPipeline), SMALL)],
    "StableDiffusionXLImg2ImgPipeline": [Case(lambda: stable_diffusion_xl(diffusers.StableDiffusionXLImg2ImgPipeline), EDIT, {"image": pictures()})],
    "StableDiffusionXLInpaintPipeline": [
        Case(lambda: stable_diffusion_xl(diffusers.StableDiffusionXLInpaintPipeline, unet=xl_unet(in_channels=2 * LATENT_CHANNELS + 1)), SMALL, INPAINT),
        Case(
            lambda: stable_diffusion_xl(diffusers.StableDiffusionXLInpaintPipeline),
            {**SMALL, **EDIT},
            INPAINT,
            variant="blending",
            remark="a denoiser of text to image: the known part is put back after every step",
        ),
    ],
    "StableDiffusionXLInstructPix2PixPipeline": [
        Case(
            lambda: stable_diffusion_xl(diffusers.StableDiffusionXLInstructPix2PixPipeline, unet=xl_unet(in_channels=2 * LATENT_CHANNELS)),
            {**SMALL, "image_guidance_scale": 1.5},
            {"image": pictures()},
        )
    ],
    "KolorsPipeline": [Case(lambda: kolors(diffusers.KolorsPipeline), {**SMALL, "max_sequence_length": 32})],
    "KolorsImg2ImgPipeline": [
        Case(lambda: kolors(diffusers.KolorsImg2ImgPipeline), {**SMALL, **EDIT, "max_sequence_length": 32}, {"image": pictures()}),
    ],
}

ABSENT: dict[str, str] = {}
