"""Modular pipelines of newer image models: Krea 2, ERNIE-Image, Ideogram 4, Anima, FLUX.3; and Cosmos 3."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers

from ..case import Case
from ..modular_parts import modular
from ..parts import LATENT_CHANNELS, TEXT_WIDTH, causal_vae, pictures, pil_pictures, qwen3, qwen_tokenizer, seeded, shifted_flow, t5_tokenizer
from ..vision_language import qwen3_vl, vision_processor, vision_tokenizer
from .cosmos import OMNI, denoiser, omni
from .flux2 import flux2_vae, mistral_parts

PACKED = 4 * LATENT_CHANNELS


def _text(layers: int, cls: type = transformers.Qwen3VLModel) -> dict[str, Any]:
    """A text encoder as deep as the model that it stands for, whose layers are read by their numbers."""
    return {"tokenizer": vision_tokenizer(), "text_encoder": qwen3_vl(cls, num_hidden_layers=layers)}


def krea_2(cls: type):
    transformer = seeded(
        diffusers.Krea2Transformer2DModel, in_channels=PACKED, num_layers=1, attention_head_dim=16, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32, timestep_embed_dim=16, text_hidden_dim=TEXT_WIDTH, text_num_attention_heads=2, text_num_key_value_heads=2,
        text_intermediate_size=32, num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    vae = causal_vae(diffusers.AutoencoderKLQwenImage)
    return modular(cls, {"transformer": transformer, "vae": vae, "scheduler": shifted_flow(use_dynamic_shifting=True), **_text(35)})


def ernie():
    transformer = seeded(
        diffusers.ErnieImageTransformer2DModel, hidden_size=32, num_attention_heads=2, num_layers=1, ffn_hidden_size=32, in_channels=PACKED,
        out_channels=PACKED, text_in_dim=TEXT_WIDTH, rope_axes_dim=(4, 4, 8),
    )  # fmt: skip
    parts = {"transformer": transformer, "vae": flux2_vae(), "scheduler": shifted_flow(), **mistral_parts(transformers.Mistral3Model)}
    return modular(diffusers.ErnieImageModularPipeline, parts)


def _ideogram_denoiser(layers: int):
    return seeded(
        diffusers.Ideogram4Transformer2DModel, in_channels=PACKED, num_layers=layers, attention_head_dim=16, num_attention_heads=2, intermediate_size=32,
        adaln_dim=16, llm_features_dim=13 * TEXT_WIDTH, mrope_section=(4, 2, 2),
    )  # fmt: skip


def ideogram_4():
    """A model of its own predicts without the text."""
    models = {"transformer": _ideogram_denoiser(2), "unconditional_transformer": _ideogram_denoiser(1)}
    return modular(diffusers.Ideogram4ModularPipeline, {**models, "vae": flux2_vae(), "scheduler": shifted_flow(), **_text(36)})


def anima():
    t5 = t5_tokenizer()
    conditioner = seeded(
        diffusers.AnimaTextConditioner, source_dim=TEXT_WIDTH, target_dim=TEXT_WIDTH, model_dim=TEXT_WIDTH, num_layers=1, num_attention_heads=2,
        target_vocab_size=len(t5), min_sequence_length=8,
    )  # fmt: skip
    parts = {
        "tokenizer": qwen_tokenizer(), "text_encoder": qwen3(), "t5_tokenizer": t5, "text_conditioner": conditioner, "scheduler": shifted_flow(),
        "transformer": denoiser(LATENT_CHANNELS), "vae": causal_vae(diffusers.AutoencoderKLQwenImage),
    }  # fmt: skip
    return modular(diffusers.AnimaModularPipeline, parts)


def flux_3(cls: type, flow_map: bool = False):
    transformer = seeded(
        diffusers.Flux3Transformer2DModel, in_channels=PACKED, cond_in_channels=PACKED, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=2 * TEXT_WIDTH, timestep_channels=16, axes_dims_rope=(4, 4, 4, 4), flow_map=flow_map,
    )  # fmt: skip
    text = {"tokenizer": vision_processor(transformers.Qwen3VLProcessor), "text_encoder": qwen3_vl()}
    return modular(cls, {"transformer": transformer, "vae": flux2_vae(), "scheduler": shifted_flow(shift=6.93), **text}, without=("prompt_upsampler",))


def cosmos_3():
    pipeline = modular(diffusers.Cosmos3OmniModularPipeline, omni())
    pipeline.disable_safety_checker()
    return pipeline


def cosmos_3_distilled():
    pipeline = modular(diffusers.Cosmos3DistilledModularPipeline, omni(), scheduler=shifted_flow(), distilled_sigmas=[1.0, 0.75, 0.5, 0.25])
    pipeline.disable_safety_checker()
    return pipeline


UNGUIDED = {"height": 32, "width": 32, "num_inference_steps": 4}
GUIDED = {"guidance_scale": 3.0, "negative_prompt": "blurry"}
PICTURE = {**UNGUIDED, **GUIDED}
SHORT = {"max_sequence_length": 32}
PART = {"strength": 0.8, "num_inference_steps": 5}
FLUX_3 = {**UNGUIDED, "text_encoder_out_layers": (0, 1), "max_sequence_length": 160}
WITHOUT_UPSAMPLER: dict[str, Any] = {"one_sample": True, "remark": "without the language model that writes the prompt anew, as its documentation says"}
WORLD = {**OMNI, "negative_prompt": ""}
CASES: dict[str, list[Case]] = {
    "Krea2ModularPipeline": [Case(lambda: krea_2(diffusers.Krea2ModularPipeline), {**PICTURE, **SHORT})],
    "Krea2TurboModularPipeline": [Case(lambda: krea_2(diffusers.Krea2TurboModularPipeline), {**UNGUIDED, **SHORT})],
    "ErnieImageModularPipeline": [Case(ernie, PICTURE)],
    "Ideogram4ModularPipeline": [Case(ideogram_4, {**UNGUIDED, "guidance_schedule": [3.0] * 4, "max_sequence_length": 96})],
    "AnimaModularPipeline": [
        Case(anima, {**PICTURE, **SHORT}),
        Case(anima, {**PICTURE, **SHORT, **PART}, {"image": pictures(32)}, variant="from images"),
    ],
    "Flux3ModularPipeline": [
        Case(lambda: flux_3(diffusers.Flux3ModularPipeline), {**FLUX_3, **GUIDED}, **WITHOUT_UPSAMPLER),
        Case(lambda: flux_3(diffusers.Flux3ModularPipeline), {**FLUX_3, **GUIDED, "image": pil_pictures(32)[0]}, variant="edit", **WITHOUT_UPSAMPLER),
    ],
    "Flux3DistilledModularPipeline": [Case(lambda: flux_3(diffusers.Flux3DistilledModularPipeline, flow_map=True), FLUX_3, **WITHOUT_UPSAMPLER)],
    "Cosmos3OmniModularPipeline": [Case(cosmos_3, WORLD, one_sample=True)],
    "Cosmos3DistilledModularPipeline": [Case(cosmos_3_distilled, {name: v for name, v in OMNI.items() if name != "guidance_scale"}, one_sample=True)],
}  # fmt: skip

ABSENT: dict[str, str] = {}
