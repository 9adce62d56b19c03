"""CogView 3 Plus and 4, and AuraFlow."""

from __future__ import annotations

import diffusers
import transformers

from ..case import Case
from ..parts import (
    LANGUAGE_MODEL,
    LATENT_CHANNELS,
    SHORT,
    SMALL,
    TEXT_WIDTH,
    gemma_tokenizer,
    image_vae,
    pictures,
    quiet,
    seeded,
    shifted_flow,
    t5_parts,
    t5_tokenizer,
)  # fmt: skip


def _cogview3():
    """Predicts the velocity of a noise schedule that ends without signal."""
    transformer = seeded(
        diffusers.CogView3PlusTransformer2DModel, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, text_embed_dim=TEXT_WIDTH, time_embed_dim=8, condition_dim=2, pos_embed_max_size=8, sample_size=8,
    )  # fmt: skip
    scheduler = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=4.0, set_alpha_to_one=True, timestep_spacing="trailing"
    )
    return quiet(diffusers.CogView3PlusPipeline(transformer=transformer, vae=image_vae(levels=3), scheduler=scheduler, **t5_parts()))


def _cogview4(cls: type, in_channels: int = LATENT_CHANNELS):
    transformer = seeded(
        diffusers.CogView4Transformer2DModel, in_channels=in_channels, out_channels=LATENT_CHANNELS, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        text_embed_dim=TEXT_WIDTH, time_embed_dim=8, condition_dim=4,
    )  # fmt: skip
    scheduler = shifted_flow(shift=1.0, base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True, time_shift_type="linear")
    tokenizer = gemma_tokenizer()
    text_encoder = seeded(transformers.GlmModel, transformers.GlmConfig(vocab_size=len(tokenizer), pad_token_id=0, **LANGUAGE_MODEL))
    return quiet(cls(transformer=transformer, vae=image_vae(), scheduler=scheduler, tokenizer=tokenizer, text_encoder=text_encoder))


def _aura_flow():
    transformer = seeded(
        diffusers.AuraFlowTransformer2DModel, sample_size=8, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, num_mmdit_layers=1,
        num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=TEXT_WIDTH, caption_projection_dim=16, pos_embed_max_size=64,
    )  # fmt: skip
    tokenizer = t5_tokenizer()
    config = transformers.UMT5Config(vocab_size=len(tokenizer), d_model=TEXT_WIDTH, d_kv=8, d_ff=32, num_heads=4, num_layers=1, dropout_rate=0.0)
    text = {"tokenizer": tokenizer, "text_encoder": seeded(transformers.UMT5EncoderModel, config)}
    vae = image_vae(scaling_factor=0.13025)
    return quiet(diffusers.AuraFlowPipeline(transformer=transformer, vae=vae, scheduler=shifted_flow(shift=1.73), **text))


CALL = {**SMALL, **SHORT}

CASES: dict[str, list[Case]] = {
    "CogView3PlusPipeline": [Case(_cogview3, CALL)],
    "CogView4Pipeline": [Case(lambda: _cogview4(diffusers.CogView4Pipeline), CALL)],
    "CogView4ControlPipeline": [Case(lambda: _cogview4(diffusers.CogView4ControlPipeline, 2 * LATENT_CHANNELS), CALL, {"control_image": pictures()})],
    "AuraFlowPipeline": [Case(_aura_flow, CALL)],
}

ABSENT: dict[str, str] = {}
