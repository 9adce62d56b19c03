"""mini-sd: denoising diffusion with a small UNet that predicts the noise."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from ..teaching import LATENT_SIZE, save_pipeline, text_config
from .endless import Training, train_on
from .growth import grown, said_sides, tell_sides_apart
from .latents import LatentScenes

BATCH, MAX_WEIGHT = 64, 100.0
# So many first updates see nothing but scenes with a side, at the steps where a side is decided: among all others it is not learned in hundreds.
SIDES_FIRST, SIDES_AT = 150, (500, 760)
UNET = {
    "sample_size": LATENT_SIZE, "block_out_channels": (48, 96, 96), "layers_per_block": 1, "cross_attention_dim": 128, "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), "norm_num_groups": 16,
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip


def build_scheduler() -> DDIMScheduler:
    """Not Stable Diffusion's betas: on 16 x 16 latents their last step still shows the mean, which is the background's colour."""
    return DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing", steps_offset=1)


def where_layout_is_decided(alphas: Tensor) -> tuple[Tensor, Tensor]:
    """How often a timestep is drawn, and the weight of its squared error of the noise; (T,) each.

    An object's place is decided where the signal has a hundredth of the noise's variance. The noise is nearly known there, whatever the
    caption says, so an error of the layout costs nothing in the plain loss, nor with min-SNR weights: a model trained so draws objects
    at random places (position 0.28 of four). The weight is therefore that of the velocity's error, 1 / alpha (for the variance
    kept, alpha), at most 100; timesteps are drawn normal in the log of the signal-to-noise ratio (mean -1, deviation 2.2), a tenth evenly.
    """
    log_snr = (alphas / (1 - alphas)).log()
    spacing = -torch.diff(log_snr, append=(2 * log_snr[-1] - log_snr[-2])[None])
    density = torch.exp(-0.5 * ((log_snr + 1) / 2.2) ** 2) * spacing
    return 0.9 * density / density.sum() + 0.1 / len(alphas), (1 / alphas).clamp(max=MAX_WEIGHT)


def load_or_build(out: Path, data: LatentScenes, tokenizer: CLIPTokenizer) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """UNet and text encoder: those in the output folder, new ones without. A UNet of two levels grows first (`growth`)."""
    folder = out / "mini-sd"
    if folder.exists():
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
        encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
        if len(unet.config.block_out_channels) > 2:
            return unet.train(), encoder
        unet = grown(unet)
    else:
        unet, encoder = UNet2DConditionModel(**UNET), CLIPTextModel(text_config(tokenizer, 128, 2))
    left = tell_sides_apart(encoder, tokenizer, data.ids.long())
    print(f"sd: the text encoder tells sides apart, {left:.0%} of the error left", flush=True)
    return unet.train(), encoder


def train_sd(out: Path, minutes: float, decay: bool = False) -> None:
    """UNet, epsilon loss weighted as `where_layout_is_decided` says, text encoder trained along."""
    data = LatentScenes(out, "mini-sd")
    tokenizer = data.tokenizer
    unet, encoder = load_or_build(out, data, tokenizer)
    scheduler = build_scheduler()
    shares, weights = where_layout_is_decided(scheduler.alphas_cumprod)
    # StableDiffusionPipeline knows no shift: the mean of the latents is folded into the data.
    mean = data.vae.config.shift_factor * data.vae.config.scaling_factor

    sided = (said_sides(tokenizer, data.ids.long())[:, -1] >= 0).nonzero()[:, 0]
    training = Training([unet, encoder], rates=(0.02, 1e-3))

    def loss_fn() -> Tensor:
        first = training.updates < SIDES_FIRST
        x0, ids = data.batch(BATCH, sided if first else None)
        x0, noise = x0 + mean, torch.randn_like(x0)
        t = torch.randint(*SIDES_AT, (len(x0),)) if first else torch.multinomial(shares, len(x0), replacement=True)
        predicted = unet(scheduler.add_noise(x0, noise, t), t, encoder(ids)[0]).sample
        return (weights[t] * (predicted - noise).square().mean((1, 2, 3))).mean()

    def save() -> None:
        vae = AutoencoderKL.from_pretrained(out / "vae")
        vae.register_to_config(shift_factor=None)
        pipeline = StableDiffusionPipeline(
            unet=unet, scheduler=scheduler, vae=vae, text_encoder=encoder, tokenizer=tokenizer, safety_checker=None,
            feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        save_pipeline(pipeline, out / "mini-sd")

    train_on("sd", training, loss_fn, save, out, minutes, decay)
