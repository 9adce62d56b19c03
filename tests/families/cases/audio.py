"""Sound and music: AudioLDM 1 and 2, Stable Audio 1 and 3, ACE-Step, LongCat-Audio."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers
from diffusers.pipelines.ace_step.modeling_ace_step import AceStepConditionEncoder

from ..case import Case
from ..parts import LANGUAGE_MODEL, STABLE_DIFFUSION_BETAS, TEXT_WIDTH, byte_vocabulary, gemma_tokenizer, image_vae, qwen_tokenizer, seeded, t5_parts, unet

SOUND = {"num_inference_steps": 4, "guidance_scale": 3.0}
WIDTH = 8


# --- spectrograms ------------------------------------------------------------------------------------------------------


def roberta_tokenizer() -> transformers.RobertaTokenizer:
    """One token a byte."""
    return transformers.RobertaTokenizer(vocab=byte_vocabulary("<s>", "<pad>", "</s>", "<unk>", "<mask>"), merges=[], model_max_length=77)


def clap_text_fields(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": 16, "num_attention_heads": 1, "num_hidden_layers": 1,
        "projection_dim": WIDTH, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "max_position_embeddings": 96,
    }  # fmt: skip


def clap(tokenizer: Any) -> torch.nn.Module:
    audio = {
        "spec_size": 8, "window_size": 4, "num_mel_bins": 8, "depths": [1, 1], "num_attention_heads": [1, 1], "num_hidden_layers": 1,
        "hidden_size": 192, "projection_dim": WIDTH, "patch_size": 2, "patch_stride": 2, "patch_embed_input_channels": 4,
    }  # fmt: skip
    config = transformers.ClapConfig(text_config=clap_text_fields(tokenizer), audio_config=audio, projection_dim=WIDTH)
    return seeded(transformers.ClapModel, config)


def vocoder() -> torch.nn.Module:
    return seeded(
        transformers.SpeechT5HifiGan,
        transformers.SpeechT5HifiGanConfig(
            model_in_dim=8, sampling_rate=16000, upsample_initial_channel=16, upsample_rates=[2, 2], upsample_kernel_sizes=[4, 4],
            resblock_kernel_sizes=[3, 7], resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]], normalize_before=False,
        ),
    )  # fmt: skip


def ddim() -> diffusers.DDIMScheduler:
    return diffusers.DDIMScheduler(**STABLE_DIFFUSION_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def spectrogram_parts() -> dict[str, Any]:
    return {"vae": image_vae(in_channels=1, out_channels=1), "scheduler": ddim(), "vocoder": vocoder()}


def audioldm_2():
    tokenizer = roberta_tokenizer()
    denoiser = seeded(
        diffusers.AudioLDM2UNet2DConditionModel, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=8, sample_size=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=((None, 16, TEXT_WIDTH),) * 2,
    )  # fmt: skip
    language_model = seeded(transformers.GPT2LMHeadModel, transformers.GPT2Config(n_embd=16, n_head=1, n_layer=1, vocab_size=100, n_positions=99))
    language_model.config.max_new_tokens = 8
    projection = seeded(diffusers.AudioLDM2ProjectionModel, text_encoder_dim=WIDTH, text_encoder_1_dim=TEXT_WIDTH, langauge_model_dim=16)
    return diffusers.AudioLDM2Pipeline(
        unet=denoiser, tokenizer=tokenizer, text_encoder=clap(tokenizer), language_model=language_model, projection_model=projection,
        feature_extractor=transformers.ClapFeatureExtractor(hop_length=7900), **t5_parts("_2"), **spectrogram_parts(),
    )  # fmt: skip


def audioldm():
    tokenizer = roberta_tokenizer()
    denoiser = unet(
        cross_attention_dim=(8, 16), class_embed_type="simple_projection", projection_class_embeddings_input_dim=WIDTH, class_embeddings_concat=True,
        block_out_channels=(8, 16), norm_num_groups=8,
    )  # fmt: skip
    text_encoder = seeded(transformers.ClapTextModelWithProjection, transformers.ClapTextConfig(**clap_text_fields(tokenizer)))
    return diffusers.AudioLDMPipeline(unet=denoiser, tokenizer=tokenizer, text_encoder=text_encoder, **spectrogram_parts())


# --- waves -------------------------------------------------------------------------------------------------------------


def oobleck(channels: int) -> torch.nn.Module:
    return seeded(
        diffusers.AutoencoderOobleck, encoder_hidden_size=6, downsampling_ratios=[1, 2], decoder_channels=3, decoder_input_channels=channels,
        audio_channels=2, channel_multiples=[2, 4], sampling_rate=4,
    )  # fmt: skip


def stable_audio():
    transformer = seeded(
        diffusers.StableAudioDiTModel, sample_size=4, in_channels=3, num_layers=1, attention_head_dim=4, num_key_value_attention_heads=2,
        out_channels=3, cross_attention_dim=4, time_proj_dim=8, global_states_input_dim=8, cross_attention_input_dim=4,
    )  # fmt: skip
    projection = seeded(diffusers.StableAudioProjectionModel, text_encoder_dim=TEXT_WIDTH, conditioning_dim=4, min_value=0, max_value=32)
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential")
    parts = t5_parts()
    parts["tokenizer"].model_max_length = 32
    return diffusers.StableAudioPipeline(transformer=transformer, vae=oobleck(3), scheduler=scheduler, projection_model=projection, **parts)


def stable_audio_3(cls: type):
    transformer = seeded(
        diffusers.StableAudio3DiTModel, io_channels=8, patch_size=1, embed_dim=32, depth=1, num_heads=4, cond_token_dim=16, global_cond_dim=16,
        local_add_cond_dim=9, timestep_features_dim=16, ff_mult=2, num_memory_tokens=3, use_differential_attention=False,
    )  # fmt: skip
    vae = seeded(
        diffusers.AutoencoderSAME, audio_channels=2, patch_size=2, encoder_channels=8, encoder_c_mults=(2,), encoder_strides=(2,),
        encoder_transformer_depths=(1,), latent_dim=8, use_differential_attention=False, dim_heads=4, ff_mult=2, sampling_rate=16,
    )  # fmt: skip
    tokenizer = gemma_tokenizer()
    tokenizer.model_max_length = 64
    module = transformers.T5GemmaModuleConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        max_position_embeddings=64, sliding_window=64, layer_types=["full_attention", "full_attention"],
    )  # fmt: skip
    config = transformers.T5GemmaConfig(encoder=module.to_dict(), decoder=module.to_dict(), is_encoder_decoder=False)
    embedder = seeded(diffusers.StableAudio3DurationEmbedder, output_dim=16, fourier_dim=16)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0, stochastic_sampling=False)
    return cls(
        transformer=transformer, scheduler=scheduler, vae=vae, tokenizer=tokenizer, duration_embedder=embedder,
        text_encoder=seeded(transformers.T5GemmaEncoderModel, config),
    )  # fmt: skip


def ace_step():
    layers = {
        "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rope_theta": 10000.0,
        "sliding_window": 16,
    }  # fmt: skip
    transformer = seeded(diffusers.AceStepTransformer1DModel, num_hidden_layers=1, in_channels=24, audio_acoustic_hidden_dim=8, patch_size=2, **layers)
    encoder = seeded(
        AceStepConditionEncoder, text_hidden_dim=TEXT_WIDTH, timbre_hidden_dim=8, num_lyric_encoder_hidden_layers=1,
        num_timbre_encoder_hidden_layers=1, **layers,
    )  # fmt: skip
    for name, parameter in transformer.named_parameters():
        if "cross_attn" in name:  # so much that no token's prediction is the same without the prompt, in any precision: the guidance divides by how they differ
            parameter.data.mul_(4)
    tokenizer = qwen_tokenizer()
    text_encoder = seeded(transformers.Qwen3Model, transformers.Qwen3Config(vocab_size=len(tokenizer), **LANGUAGE_MODEL))
    return diffusers.AceStepPipeline(
        transformer=transformer, condition_encoder=encoder, vae=oobleck(8), text_encoder=text_encoder, tokenizer=tokenizer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
    )  # fmt: skip


def longcat_audio():
    tokenizer = t5_parts()["tokenizer"]
    config = transformers.UMT5Config(d_model=TEXT_WIDTH, d_kv=8, num_layers=1, num_heads=4, d_ff=32, vocab_size=len(tokenizer), dropout_rate=0.0)
    transformer = seeded(diffusers.LongCatAudioDiTTransformer, dit_dim=32, dit_depth=1, dit_heads=4, dit_text_dim=TEXT_WIDTH, latent_dim=8, text_conv=False)
    vae = seeded(
        diffusers.LongCatAudioDiTVae, in_channels=1, channels=16, c_mults=[1, 2], strides=[2], latent_dim=8, encoder_latent_dim=16,
        downsampling_ratio=2, sample_rate=240,
    )  # fmt: skip
    return diffusers.LongCatAudioDiTPipeline(
        transformer=transformer, vae=vae, tokenizer=tokenizer, text_encoder=seeded(transformers.UMT5EncoderModel, config),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0, invert_sigmas=True),
    )  # fmt: skip


def wave(length: int) -> torch.Tensor:
    """(2, length), a tone that grows."""
    time = torch.linspace(0, 1, length)
    return torch.stack([(20 * time).sin() * time, (13 * time).sin() * time])


ACE = {**SOUND, "audio_duration": 0.4, "max_text_length": 300, "max_lyric_length": 64}
STEPS = {"num_inference_steps": 4, "duration": 1.0}

CASES: dict[str, list[Case]] = {
    "AudioLDM2Pipeline": [Case(audioldm_2, {**SOUND, "audio_length_in_s": 0.016})],
    "AudioLDMPipeline": [Case(audioldm, {**SOUND, "audio_length_in_s": 0.016})],
    "StableAudioPipeline": [Case(stable_audio, SOUND, remark="its published scheduler, of the same space, needs torchsde")],
    "StableAudio3Pipeline": [Case(lambda: stable_audio_3(diffusers.StableAudio3Pipeline), {**STEPS, "guidance_scale": 3.0})],
    "StableAudio3AudioToAudioPipeline": [
        Case(lambda: stable_audio_3(diffusers.StableAudio3AudioToAudioPipeline), {**STEPS, "audio": wave(16)[None], "init_noise_level": 0.8})
    ],
    "StableAudio3InpaintPipeline": [
        Case(
            lambda: stable_audio_3(diffusers.StableAudio3InpaintPipeline),
            {**STEPS, "audio": wave(16)[None], "mask_start_seconds": 0.25, "mask_end_seconds": 0.75},
        )
    ],
    "AceStepPipeline": [
        Case(
            ace_step,
            ACE,
            {"lyrics": ["la la", "do re mi"]},
            remark="Without lyrics the stock call of two prompts fails in diffusers 0.42.1: it makes a list of one of its default, and looks up the second.",
        )
    ],
    "LongCatAudioDiTPipeline": [Case(longcat_audio, {**SOUND, "audio_duration_s": 0.1})],
}

ABSENT: dict[str, str] = {
    "MusicLDMPipeline": "its call fails in diffusers with transformers 5: a ClapModel returns an output there",
    "AudioDiffusionPipeline": "it needs librosa",
    "SpectrogramDiffusionPipeline": "it needs note_seq, and ONNX for its vocoder",
}
