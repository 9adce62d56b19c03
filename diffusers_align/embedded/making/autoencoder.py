"""The autoencoder that both pipelines share."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from ..teaching import IMAGE_SIZE, LATENT_SIZE, fit, make_scenes


def gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring pixels, down and across."""
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]


def train_vae(out: Path, minutes: float) -> None:
    """AutoencoderKL of factor 2 (32 px to 16 x 16 x 4): L1 on pixels and on their gradients, a light KL."""
    images = make_scenes(20000, seed=1)[0].float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)
    vae = AutoencoderKL(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1, latent_channels=4, norm_num_groups=8, mid_block_add_attention=False, sample_size=IMAGE_SIZE,
    ).to(memory_format=torch.channels_last)  # fmt: skip

    def loss_fn() -> Tensor:
        batch = images[torch.randint(0, len(images), (32,))]
        posterior = vae.encode(batch).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        edges = sum(F.l1_loss(a, b) for a, b in zip(gradients(decoded), gradients(batch)))
        return F.l1_loss(decoded, batch) + 0.5 * edges + 1e-4 * posterior.kl().mean() / LATENT_SIZE**2

    def save() -> None:
        with torch.no_grad():
            latents = vae.encode(images[:2048]).latent_dist.mode()
            decoded = vae.decode(latents[:256]).sample
        vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4), shift_factor=round(latents.mean().item(), 4))
        vae.save_pretrained(out / "vae")
        psnr = 10 * torch.log10(4 / F.mse_loss(decoded, images[:256]))
        print(f"vae: PSNR {psnr:.2f} dB, scaling factor {vae.config.scaling_factor}", flush=True)

    fit("vae", [vae], loss_fn, save, minutes, lr=2e-3)
