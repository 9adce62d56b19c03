"""SANA-WM: a world seen from a moving camera, a token's time for each token."""

from __future__ import annotations

import diffusers

from ..case import Case
from ..parts import LATENT_CHANNELS, TEXT_WIDTH, gemma_parts, seeded
from ..video_parts import picture
from .ltx2 import connectors, gemma_3_parts, latents, video_vae


def sana_wm():
    transformer = seeded(
        diffusers.SanaWMTransformer3DModel, in_channels=LATENT_CHANNELS, num_layers=2, hidden_size=32, num_attention_heads=2, softmax_every_n=2,
        linear_head_dim=16, conv_kernel_size=3, chunk_plucker_channels=12, chunk_plucker_post_attn_blocks=1, image_size=16, caption_channels=TEXT_WIDTH,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=8.0)
    return diffusers.SanaWMPipeline(transformer=transformer, vae=video_vae(), scheduler=scheduler, **gemma_parts())


def refiner():
    """Enlarges what SANA-WM made: block by block, each of which reads those before it."""
    transformer = seeded(
        diffusers.SanaWMLTX2RefinerTransformer3DModel, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, num_attention_heads=2,
        attention_head_dim=8, cross_attention_dim=16, audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4,
        audio_cross_attention_dim=8, num_layers=1, caption_channels=TEXT_WIDTH, rope_double_precision=False, rope_type="split",
    )  # fmt: skip
    return diffusers.SanaWMLTX2Refiner(
        transformer=transformer, connectors=connectors(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=video_vae(),
        text_max_sequence_length=32, **gemma_3_parts(),
    )  # fmt: skip


CASES: dict[str, list[Case]] = {
    "SanaWMPipeline": [
        Case(
            sana_wm,
            {
                "height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 4, "guidance_scale": 3.0, "max_sequence_length": 32, "image": picture(32),
                "action": "w-8", "intrinsics": [32.0, 32.0, 16.0, 16.0], "chi_prompt": ["Draw."],
            },
            one_sample=True,
        )
    ],
    "SanaWMLTX2Refiner": [Case(refiner, {"sana_latent": latents(1, LATENT_CHANNELS, 4, 4, 4), "fps": 16.0}, one_sample=True)],
}  # fmt: skip

ABSENT: dict[str, str] = {}
