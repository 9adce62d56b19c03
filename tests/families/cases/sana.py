"""Sana: a deep-compression autoencoder, a linear transformer; Sana Sprint, its few-step consistency model."""

from __future__ import annotations

import diffusers

from ..case import Case
from ..parts import LATENT_CHANNELS, SHORT, SMALL, TEXT_WIDTH, gemma_parts, pictures, quiet, seeded, shifted_flow

DENOISER = {
    "sample_size": 8, "in_channels": LATENT_CHANNELS, "out_channels": LATENT_CHANNELS, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8,
    "num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": TEXT_WIDTH,
}  # fmt: skip


def deep_vae() -> diffusers.AutoencoderDC:
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in {
        "block_types": ("ResBlock", "EfficientViTBlock"), "block_out_channels": (8, 8), "layers_per_block": (1, 1), "qkv_multiscales": ((), (5,)),
    }.items()}  # fmt: skip
    return seeded(diffusers.AutoencoderDC, latent_channels=LATENT_CHANNELS, attention_head_dim=2, scaling_factor=0.41407, **sides)


def solver() -> diffusers.DPMSolverMultistepScheduler:
    """Its published scheduler is a multistep solver of the flow."""
    return diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def sana(cls: type = diffusers.SanaPipeline, scheduler=None, config: dict | None = None, **components):
    transformer = seeded(diffusers.SanaTransformer2DModel, **DENOISER, **(config or {}))
    return quiet(cls(transformer=transformer, vae=deep_vae(), scheduler=scheduler or solver(), **gemma_parts(), **components))


def _controlled():
    return sana(diffusers.SanaControlNetPipeline, shifted_flow(), controlnet=seeded(diffusers.SanaControlNetModel, **DENOISER))


def _sprint(cls: type):
    return sana(cls, diffusers.SCMScheduler(), {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"})


CALL = {**SMALL, "height": 32, "width": 32, **SHORT, "use_resolution_binning": False, "complex_human_instruction": None}
FEW = {**CALL, "num_inference_steps": 2}

CASES: dict[str, list[Case]] = {
    "SanaPipeline": [Case(sana, CALL)],
    "SanaControlNetPipeline": [Case(_controlled, CALL, {"control_image": pictures(32)})],
    "SanaSprintPipeline": [Case(lambda: _sprint(diffusers.SanaSprintPipeline), FEW)],
    "SanaSprintImg2ImgPipeline": [
        Case(
            lambda: _sprint(diffusers.SanaSprintImg2ImgPipeline),
            {**FEW, "strength": 0.5, "num_inference_steps": 4, "intermediate_timesteps": None},
            {"image": pictures(32)},
        )
    ],
}

ABSENT: dict[str, str] = {}
