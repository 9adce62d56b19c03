"""Decoding with a gradient and little memory: activations computed again on the way back, some frames of a video alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from ..checks.ranges import checked
from ..condition import Condition
from ..driving.replacements import replaced
from ..policy import Policy
from .recompute import without_activations


@checked
def decode_latents(policy: Policy, latents: Tensor, condition: Condition | None = None, *, checkpoint: bool = True, frames: list[int] | None = None) -> Tensor:
    """`policy.decode` that computes the autoencoder's activations again on the way back.

    Args:
        frames: decode only these frames of a video, (B, len(frames), 3, H, W), in this order. If the autoencoder is causal in time, which
            a small crop tells, latents after the last of them are left out; otherwise all are decoded. Either way the frames, and
            their gradients, are those of the whole video.

    Raises:
        ValueError: `frames` where the autoencoder decodes no videos, or beyond the video's end.
    """
    with light_decoding(policy.pipeline, checkpoint, frames):
        return policy.decode(latents, condition)


@contextmanager
def light_decoding(pipeline, checkpoint: bool = False, frames: list[int] | None = None) -> Iterator[None]:
    """Context: the pipeline's tail decodes as `decode_latents` does, and has a way back also where the pipeline casts its autoencoder
    from half precision for the decoding, and to it again before anybody asks for gradients."""
    vae = getattr(pipeline, "vae", None)
    if vae is None and frames is None:
        yield
        return
    is_cast = getattr(vae, "dtype", None) == torch.float16 and getattr(vae.config, "force_upcast", False)

    def decode(original: Callable, z: Tensor, *args: Any, **kwargs: Any):
        if frames is not None:
            z = z[:, :, : _latent_frames(lambda x: original(x, *args, **kwargs), z, frames)]
        call = partial(_with_these_weights(vae, original) if is_cast else original, z, *args, **kwargs)
        output = without_activations(call) if checkpoint else call()
        return output if frames is None else pytree.tree_map_only(Tensor, lambda video: video[:, :, frames], output)

    if vae is None:
        raise ValueError(f"{type(pipeline).__name__} has no component `vae`, so its frames cannot be decoded one by one; leave `frames` out.")
    with replaced(vae, "decode", decode):
        yield


class _Decoder(nn.Module):
    def __init__(self, vae: nn.Module, decode: Callable):
        super().__init__()
        self.vae, self.decode = vae, decode

    def forward(self, *args: Any, **kwargs: Any):
        return self.decode(*args, **kwargs)


def _with_these_weights(vae: nn.Module, decode: Callable) -> Callable:
    """`decode` with the autoencoder's weights as they are now, whatever `vae.to` has made of them on the way back."""
    weights = {f"vae.{name}": tensor.detach() for name, tensor in (*vae.named_parameters(), *vae.named_buffers())}
    return lambda *args, **kwargs: functional_call(_Decoder(vae, decode), weights, args, kwargs)


@torch.no_grad()
def _latent_frames(decode: Callable, z: Tensor, frames: list[int]) -> int:
    """How many latents the frames up to the last of `frames` need: all, unless a crop shows that the autoencoder is causal."""
    if z.ndim != 5:
        raise ValueError("This pipeline's autoencoder decodes images, not videos: leave `frames` out and take images[:, frames].")
    number, last, crop = z.shape[2], max(frames), z[..., :4, :4]
    whole = _first(decode(crop))
    if last >= whole.shape[2] or min(frames) < 0:
        raise ValueError(f"The video has frames 0 to {whole.shape[2] - 1}, got {frames}.")
    ratio = max(1, (whole.shape[2] - 1) // max(1, number - 1))
    needed = min(number, 1 + -(-last // ratio))
    part = _first(decode(crop[:, :, :needed]))
    tolerance = 1e-4 if z.dtype == torch.float32 else 1e-2
    causal = part.shape[2] > last and bool((part - whole[:, :, : part.shape[2]]).abs().max() <= tolerance * whole.abs().max())
    return needed if causal else number


def _first(output) -> Tensor:
    return next(x for x in pytree.tree_leaves(output) if isinstance(x, Tensor))
