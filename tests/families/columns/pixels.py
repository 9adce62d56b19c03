"""Latents to pictures and back, and the stock call's own samples."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_align import differentiable_rollout
from diffusers_align.driving.latent_layout import in_float32
from diffusers_align.driving.outcome import on_white
from diffusers_align.driving.replacements import replaced
from diffusers_align.driving.stock import stock_images
from diffusers_align.gradients.check import check_gradient

from ..cell import DoesNotApply, Fault, require
from ..column import Column
from ..subject import Subject, relative_error, smooth, tensor_of

SAME = 1e-4


def is_sound(shape: torch.Size) -> bool:
    """Whether `decode` made waveforms; whether they are (B, C, T) is its own column's matter."""
    return len(shape) < 4


def is_of_8_bits(images: Tensor) -> bool:
    """Whether all values in [0, 1] are 255ths."""
    return float((255 * images - (255 * images).round()).abs().max()) < 1e-3


@torch.no_grad()
def decode(subject: Subject) -> str | None:
    trajectory = subject.trajectory
    images = subject.policy.decode(trajectory.final, trajectory.condition)
    require(isinstance(images, Tensor), f"decode returns a {type(images).__name__}.")
    require(len(images) == subject.size, f"{len(images)} pictures of {subject.size} samples.")
    require(bool(images.isfinite().all()), "The pictures are not finite.")
    if is_sound(images.shape):
        require(images.ndim == 3, f"Waveforms are {tuple(images.shape)}, not (B, C, T).")
        require(images.abs().max() <= 1, f"Values up to {images.abs().max():.3g}, not in [-1, 1].")
        return "audio (B, C, T)"
    require(images.ndim in (4, 5) and images.shape[-3] == 3, f"Shape {tuple(images.shape)}, not (B, [F,] 3, H, W).")
    require(images.min() >= 0 and images.max() <= 1, f"Values from {images.min():.3g} to {images.max():.3g}, not in [0, 1].")
    return None


def encoded_by(vae: nn.Module, images: Tensor, takes_videos: bool) -> Tensor:
    """What the autoencoder makes of pictures or videos in [0, 1], without any pipeline."""
    pixels = images * 2 - 1
    if takes_videos:
        pixels = pixels[:, :, None] if images.ndim == 4 else pixels.transpose(1, 2)
    elif images.ndim == 5:
        pixels = pixels.flatten(0, 1)
    if vae.config.get("in_channels", vae.config.get("input_channels")) == 4:
        pixels = torch.cat([pixels, torch.ones_like(pixels[:, :1])], 1)
    with in_float32(vae):
        code = vae.encode(pixels)
    return code.latent_dist.mode() if hasattr(code, "latent_dist") else code.latents if hasattr(code, "latents") else code.latent


def autoencoded(vae: nn.Module, images: Tensor, takes_videos: bool, held: Tensor | None = None, own: Tensor | None = None) -> Tensor:
    """Pictures or videos after a round trip through the autoencoder, in [0, 1], without any pipeline. Where `held` is true, `own` is decoded."""
    frames, z = images.shape[1] if images.ndim == 5 else 1, encoded_by(vae, images, takes_videos)
    z = z if held is None or held.shape != z.shape else torch.where(held, own, z)
    decoded = vae.decode(z.to(vae.dtype), **({"num_frames": frames} if "num_frames" in inspect.signature(vae.decode).parameters else {})).sample
    if takes_videos:
        decoded = decoded.squeeze(2) if images.ndim == 4 else decoded if decoded.shape == images.shape else decoded.transpose(1, 2)
    elif images.ndim == 5:
        decoded = decoded.unflatten(0, (-1, frames))
    decoded = (decoded / 2 + 0.5).clamp(0, 1)
    return on_white(decoded) if decoded.shape[-3] == 4 else decoded


@torch.no_grad()
def encode(subject: Subject) -> str | None:
    policy, trajectory = subject.policy, subject.trajectory
    components = policy.pipeline.components
    vae = next((components[name] for name in ("vae", "movq", "vqvae", "vqgan") if isinstance(components.get(name), nn.Module)), None)

    def decoded(latents: Tensor) -> tuple[Tensor, list[Tensor]]:
        received = []

        def watch(decode: Callable, z: Tensor, *args: Any, **kwargs: Any):
            received.append(z)
            return decode(z, *args, **kwargs)

        with nullcontext() if vae is None else replaced(vae, "decode", watch):
            return policy.decode(latents, trajectory.condition), received

    own_images, own = decoded(trajectory.final)
    if is_sound(own_images.shape):
        raise DoesNotApply("Audio: `encode` is of pictures and videos.")
    images = smooth(own_images.shape)
    latents = policy.encode(images, trajectory.condition)
    require(latents.shape == trajectory.final.shape, f"Latents {tuple(latents.shape)}, the roll-out's are {tuple(trajectory.final.shape)}.")
    actual, received = decoded(latents)
    # What is decoded whatever the latents is the condition's: a kept region, a given frame.
    held = received[0] == own[0] if len(received) == len(own) == 1 and received[0].shape == own[0].shape else None
    expected = images if vae is None else autoencoded(vae, images, any(z.ndim == 5 for z in own), held, own[0])
    error = relative_error(actual, expected)
    rounding = 1e-3 if vae is None or vae.dtype == torch.float32 else 3e-2
    stretched, videos = "", any(z.ndim == 5 for z in own)
    if vae is not None and rounding < error <= 1 / 128 and relative_error(received[0], encoded_by(vae, images, videos)) <= rounding:
        # Autoencoders that were trained on pictures / 128 - 1: the pipeline brings what they make to full scale.
        error, stretched = 0.0, f"the pipeline stretches what its autoencoder makes, by {error:.1e}"
    if error > rounding and len(own) == 1 and vae is not None:  # some go on from what is decoded: to grey, to directions
        code = encoded_by(vae, images, videos)
        with replaced(vae, "decode", lambda decode, z, *args, **kwargs: decode(code.to(z).reshape(z.shape), *args, **kwargs)):
            error = relative_error(actual, policy.decode(latents, trajectory.condition))
    require(error <= rounding, f"decode(encode(pictures)) is off by {error:.1e} from the autoencoder's own round trip.")
    share = 0.0 if held is None else float(held.double().mean())
    require(share < 1, "The pictures make no difference.")
    return f"the condition holds {share:.0%} of what is decoded" if share else stretched or None


def as_made(expected: Tensor, own: Tensor) -> Tensor:
    """The stock call's output in the form of the policy's: sounds have channels there, and end at full scale."""
    expected = expected.clamp(-1, 1) if own.ndim == 3 else expected
    return expected.reshape(own.shape) if own.numel() == expected.numel() else expected


@torch.no_grad()
def solver(subject: Subject) -> str:
    """The stock solver walked by the policy: the pictures of the stock call, whatever the twin."""
    policy, condition = subject.policy, subject.trajectory.condition
    own, expected = tensor_of((stock_images(policy, condition),)), subject.stock_images
    expected = as_made(expected, own)
    error = relative_error(own, expected)
    # A safety checker may take pictures of 8 bits; roll-outs ask none.
    if error > SAME and own.shape == expected.shape and is_of_8_bits(expected) and float((own - expected).abs().max()) <= 1.01 / 255:
        return "the stock call's output has 8 bits"
    require(error <= SAME, f"Off by {error:.1e} from the stock call (shapes {tuple(own.shape)}, {tuple(expected.shape)}).")
    return "bit for bit" if error == 0 else ""


@torch.no_grad()
def deterministic(subject: Subject) -> str:
    policy = subject.policy
    twin, stock = policy.scheduler, policy.stock_scheduler
    if not isinstance(twin, type(stock)):
        walked = next(cls.__name__ for cls in type(twin).__mro__ if cls.__module__.startswith("diffusers."))
        raise DoesNotApply(f"Other solver: {type(stock).__name__}, walked as {walked}.")
    trajectory, other = (subject.rollout(deterministic=True, step_seeds=[seed + own for seed in subject.seeds]) for own in (20, 30))
    if not torch.equal(trajectory.final, other.final):
        raise DoesNotApply("The stock sampler draws noise of its own, so that there is no walk without: another column compares it with the stock call.")
    try:
        latents = subject.stock_latents
        error = relative_error(trajectory.final, latents)
    except Exception:  # no such output of the stock call
        latents, error = None, float("inf")
    if error <= SAME:
        return "bit for bit" if error == 0 else ""
    images = policy.outcome(trajectory).images
    of_images = relative_error(images, as_made(subject.stock_images, images))
    if of_images <= SAME:
        return "compared as pictures: the call's latents have another form"
    form = "none" if latents is None else f"{error:.1e} as latents"
    raise Fault(f"Off by {of_images:.1e} from the stock call's pictures ({form}).")


def pixel_gradient(subject: Subject) -> None:
    policy, trajectory = subject.policy, subject.trajectory
    assert subject.lora
    subject.forget_gradients()
    rollout = differentiable_rollout(policy, trajectory.condition, grad_steps=range(trajectory.num_steps))
    if not rollout.images.requires_grad:
        check_gradient(policy, trajectory.condition, lambda images: images.flatten(1).mean(1), grad_steps=[0])  # says where it is cut
    weights = torch.randn(rollout.images.shape, generator=torch.Generator().manual_seed(3))
    (rollout.images.float() * weights).sum().backward()
    for name, total in subject.gradients().items():
        require(0 < total < float("inf"), f"The gradient of the {name} is {total}.")


COLUMNS = (
    Column("decode", "dec", "`decode` gives (B, [F,] 3, H, W) in [0, 1], audio as (B, C, T) in [-1, 1]", decode, ("rollout",)),
    Column("encode", "enc", "`encode` is `decode`'s inverse as far as the autoencoder allows", encode, ("rollout", "decode")),
    Column("solver", "sol", "the stock solver, walked by the policy, makes the stock call's output", solver, ("rollout",)),
    Column("deterministic", "ode", "the deterministic roll-out is the stock call, where the solver is the same", deterministic, ("rollout",)),
    Column("pixels", "pix", "a reward's gradient reaches every denoiser's LoRA through the whole sampling", pixel_gradient, ("rollout",)),
)
