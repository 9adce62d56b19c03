"""Finds, by probing, how a pipeline lays out its latents, so that images can be encoded for any model family.

Between the last scheduler step and `vae.decode`, pipelines unpack, scale, shift and transpose. In every family tried this is
an affine map of each element and a permutation, so a few probes with known latents recover it, and its inverse turns encoded
images into the pipeline's own latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LatentLayout:
    """z[j] = scale[j] * latents[index[j]] + shift[j], with z what `vae.decode` receives, all flattened.

    Attributes:
        image_shape: of the images this holds for, without the batch.
        latent_shape, z_shape: of one sample, without the batch.
    """

    vae: Any
    image_shape: torch.Size
    latent_shape: torch.Size
    z_shape: torch.Size
    index: Tensor
    scale: Tensor
    shift: Tensor

    @classmethod
    @torch.no_grad()
    def find(cls, policy, condition, images: Tensor) -> LatentLayout:
        """Probe `policy`'s tail for one sample of `condition`.

        Raises:
            ValueError: there is no `vae` to encode with, the map is not a permutation, or its round trip fails.
        """
        vae = getattr(policy.pipeline, "vae", None)
        if vae is None or not hasattr(vae, "encode"):
            raise ValueError(f"{type(policy.pipeline).__name__} has no autoencoder that encodes, so images cannot become latents.")
        shape, zeros = _tail(policy, condition, torch.zeros_like)
        scale = _tail(policy, condition, torch.ones_like)[1] - zeros
        number = shape[1:].numel()
        if zeros.numel() != number or bool((scale == 0).any()):
            raise ValueError(f"The tail maps {number} latents to {zeros.numel()} values: not an affine map and a permutation.")
        index = _probe_index(policy, condition, number, zeros, scale)
        layout = cls(vae, images.shape[1:], shape[1:], zeros.shape[1:], index, scale.flatten(), zeros.flatten())
        layout._verify(policy, condition, images)
        return layout

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) or (B, F, 3, H, W) in [0, 1] -> (B, *D)."""
        return self._to_latents(_autoencode(self.vae, images, video=len(self.z_shape) == 4), len(images))

    def _to_latents(self, z: Tensor, batch: int) -> Tensor:
        flat = (z.reshape(batch, -1).double() - self.shift) / self.scale
        latents = torch.empty_like(flat)
        latents[:, self.index] = flat
        return latents.reshape(batch, *self.latent_shape).to(z.dtype)

    def _verify(self, policy, condition, images: Tensor) -> None:
        z = _autoencode(self.vae, images, video=len(self.z_shape) == 4)
        if z.numel() != self.index.numel():
            raise ValueError(
                f"Images of {tuple(images.shape[1:])} encode to {tuple(z.shape[1:])}, the pipeline's latents decode from {tuple(self.z_shape)}: "
                "pass images of the size (and number of frames) that the pipeline's call makes."
            )
        latents = self._to_latents(z, 1)
        received = _tail(policy, condition, lambda x: latents.to(x).reshape(x.shape))[1]
        error = (received.flatten() - z.double().flatten()).abs().max() / z.abs().max()
        if not error <= (1e-4 if z.dtype == torch.float32 else 3e-2):  # NaN fails too
            raise ValueError(f"The round trip through the pipeline's tail is off by {error:.1e}: it is not an affine map and a permutation.")


def _tail(policy, condition, latents_of) -> tuple[torch.Size, Tensor]:
    """Run the pipeline with `latents_of(x)` as its final latents; what shape they have and what `vae.decode` received."""
    vae, seen = policy.pipeline.vae, {}
    decode, had_own = vae.decode, "decode" in vae.__dict__

    def put(step):
        step.skip()
        seen["shape"] = step.sample.shape
        return latents_of(step.sample)

    def capture(z, *args, **kwargs):
        seen.setdefault("z", z.detach().double().clone())
        return decode(z, *args, **kwargs)

    vae.decode = capture
    try:
        policy._drive(condition, put, needs_denoiser=lambda k: False, output_type="pt")
    finally:
        if had_own:
            vae.decode = decode
        else:
            del vae.decode
    if "z" not in seen:
        raise ValueError("The pipeline did not call vae.decode, so the layout of its latents cannot be found.")
    return seen["shape"], seen["z"]


def _probe_index(policy, condition, number: int, shift: Tensor, scale: Tensor) -> Tensor:
    """Write each element's index into the latents, digit by digit as their precision allows, and read it after the tail."""
    bits = 12 if policy.pipeline.dtype == torch.float32 else 4
    index = torch.zeros(number, dtype=torch.long, device=shift.device)
    for low in range(0, max(1, (number - 1).bit_length()), bits):
        digits = ((torch.arange(number) >> low) % 2**bits).double() / 2**bits
        received = _tail(policy, condition, lambda x, d=digits: d.reshape(x.shape).to(x))[1]
        index += ((received - shift) / scale * 2**bits).round().long().flatten() << low
    if not torch.equal(index.sort().values, torch.arange(number, device=index.device)):
        raise ValueError("The pipeline's latents are not a permutation of what vae.decode receives.")
    return index


def _autoencode(vae, images: Tensor, video: bool) -> Tensor:
    """The autoencoder's latents (B, *Z), the mode where it gives a distribution."""
    pixels = images.to(vae.device, vae.dtype) * 2 - 1
    if video:
        pixels = pixels.unsqueeze(2) if pixels.ndim == 4 else pixels.transpose(1, 2)
    elif pixels.ndim == 5:
        pixels = pixels.flatten(0, 1)
    encoded = vae.encode(pixels)
    return encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
