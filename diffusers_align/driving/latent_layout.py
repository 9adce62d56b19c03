"""Finds, by probing, how a pipeline lays out its latents, so that images can be encoded for any model family.

Between the last scheduler step and `vae.decode`, pipelines unpack, scale, shift and transpose. In every family tried this is
an affine map of each element and a permutation, so a few probes with known latents recover it, and its inverse turns encoded
images into the pipeline's own latents. All of it is in float32, whatever the pipeline's precision: a map that is probed in bfloat16
is off by up to 0.4 %, a bias of every latent, and some autoencoders overflow in float16.

A condition may hold a part of what is decoded: the region that inpainting keeps, the first frame that a video is made from. Such a part is constant,
whatever the latents. It is no part of the map, and images have no say in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..condition import Condition, belongs_to_samples
from .module_tree import device_of, modules_of
from .of_driver import OfDriver
from .pipeline_state import Enough
from .replacements import replaced

if TYPE_CHECKING:
    from .driver import Driver


@dataclass(frozen=True)
class LatentLayout:
    """z[j] = scale[j] * latents[index[j]] + shift[j], with z what `vae.decode` receives, all flattened.

    Attributes:
        image_shape: of the images this holds for, without the batch.
        latent_shape, z_shape: of one sample, without the batch.
        dtype: of the pipeline's own latents.
        index: of the elements of z that are not held, in their order.
        held: of each element of z, whether it is the condition's own: there scale is 0.
        kept: the condition's own latents, which fill in those that no element of z comes from; None where there are none.
    """

    vae: Any
    image_shape: torch.Size
    latent_shape: torch.Size
    z_shape: torch.Size
    dtype: torch.dtype
    index: Tensor
    scale: Tensor
    shift: Tensor
    held: Tensor
    kept: Tensor | None = None

    @classmethod
    @torch.no_grad()
    def find(cls, driver: Driver, condition: Condition, images: Tensor) -> LatentLayout:
        """Probe the tail of the driver's pipeline for one sample of `condition`.

        Raises:
            ValueError: there is no `vae` to encode with, the map is not a permutation, its round trip fails, or the condition holds all latents.
        """
        vae = encoder_of(driver.pipeline)
        tail = _Tail.of(driver, condition)
        zeros = tail(torch.zeros_like)
        scale = (tail(torch.ones_like) - zeros).flatten()
        held = scale == 0
        number, reached = tail.shape[1:].numel(), int((~held).sum())
        if not 0 < reached <= number or not scale.isfinite().all():
            raise ValueError(f"The tail maps {number} latents to {reached} of {held.numel()} values: not an affine map and a permutation.")
        rounds = bool((tail(lambda x: torch.full_like(x, 1 + 2**-13)).flatten() == zeros.flatten() + scale)[~held].any())
        index = _probe_index(tail, number, zeros.flatten()[~held], scale[~held], held, bits=4 if rounds else 12)
        kept = tail.kept(index) if reached < number else None
        layout = cls(vae, images.shape[1:], tail.shape[1:], zeros.shape[1:], tail.dtype, index, scale, zeros.flatten(), held, kept)
        layout._verify(tail, images, tolerance=3e-2 if rounds else 1e-4)
        return layout

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) or (B, F, 3, H, W) in [0, 1] -> (B, *D), computed in float32 and rounded to the pipeline's own latents at the end."""
        z = autoencoded(self.vae, images, video=len(self.z_shape) == 4)
        return self._to_latents(z, len(images)).to(self.dtype)

    def _to_latents(self, z: Tensor, batch: int) -> Tensor:
        free = ~self.held
        flat = (z.reshape(batch, -1)[:, free].double() - self.shift[free]) / self.scale[free]
        latents = flat.new_empty(batch, self.latent_shape.numel()) if self.kept is None else self.kept.to(flat).repeat(batch, 1)
        latents[:, self.index] = flat
        return latents.reshape(batch, *self.latent_shape).to(z.dtype)

    def _verify(self, tail: _Tail, images: Tensor, tolerance: float) -> None:
        z = autoencoded(self.vae, images, video=len(self.z_shape) == 4)
        if z.numel() != self.held.numel():
            raise ValueError(
                f"Images of {tuple(images.shape[1:])} encode to {tuple(z.shape[1:])}, the pipeline's latents decode from {tuple(self.z_shape)}: "
                "pass images of the size (and number of frames) that the pipeline's call makes."
            )
        latents = self._to_latents(z, 1)
        received = tail(lambda x: latents.to(x).reshape(x.shape)).flatten()
        expected = torch.where(self.held, self.shift, z.double().flatten())
        error = (received - expected).abs().max() / expected.abs().max()
        if not error <= tolerance:  # NaN fails too
            raise ValueError(f"The round trip through the pipeline's tail is off by {error:.1e}: it is not an affine map and a permutation.")


def encoder_of(pipeline):
    """The autoencoder of a pipeline.

    Raises:
        ValueError: there is none, or it encodes nothing.
    """
    vae = getattr(pipeline, "vae", None)
    if vae is None or not hasattr(vae, "encode"):
        raise ValueError(f"{type(pipeline).__name__} has no autoencoder that encodes, so images cannot become latents.")
    return vae


@dataclass
class _Tail:
    """What a pipeline does with its final latents before it decodes them.

    Attributes:
        steps: how many the call takes.
        shape, dtype: of the pipeline's own latents; one sample.
    """

    driver: Driver
    condition: Condition
    steps: int
    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def of(cls, driver: Driver, condition: Condition) -> _Tail:
        states: list[Tensor] = []
        # What a condition holds may be drawn, by an autoencoder: the same draw for each probe.
        condition = condition if condition.seeds is not None else replace(condition, seeds=[0])

        portions = {0}

        def look(step):
            step.skip()
            if step.child == 0:
                states.append(step.sample)
                portions.add(step.portion)
            return step.sample

        driver.drive(condition, look, needs_denoiser=lambda k: False)
        if len(portions) > 1:
            driver.refuse_portions(condition, "learn on roll-outs (GRPO, DDPO), which have all of them")
        return cls(driver, condition, len(states), states[-1].shape, states[-1].dtype)

    def __call__(self, latents_of: Callable[[Tensor], Tensor]) -> Tensor:
        """What `vae.decode` receives, float64, with `latents_of(x)` as the final latents, where x is like them in float32."""
        vae, received = self.driver.pipeline.vae, []

        def capture(decode: Callable, z: Tensor, *args: Any, **kwargs: Any):
            received.append(z)
            return decode(z.to(vae.dtype), *args, **kwargs)

        with replaced(vae, "decode", capture):
            self._run(latents_of, "pt")
        if not received:
            raise ValueError("The pipeline did not call vae.decode, so the layout of its latents cannot be found.")
        return received[0].detach().double()

    def kept(self, index: Tensor) -> Tensor:
        """(D,) the latents that the call returns for latents that are 0: what it puts itself in the place of those that nothing is decoded from.

        Raises:
            ValueError: it returns none in the form of its steps.
        """
        output = self._run(torch.zeros_like, "latent") if "output_type" in self.driver.parameters else None
        latents = next((x for x in (output[0] if output is not None else None,) if isinstance(x, Tensor)), None)
        if latents is None or latents.shape != self.shape or bool(latents.flatten()[index].any()):
            raise ValueError(
                f"{self.shape[1:].numel() - len(index)} of {self.shape[1:].numel()} latents do not reach the pixels under this condition (a region or frame "
                f'that it keeps), and {type(self.driver.pipeline).__name__} returns no latents (output_type="latent") that say what stands there.'
            )
        return latents.detach().flatten().double()

    def _run(self, latents_of: Callable[[Tensor], Tensor], output_type: str):
        """The call's output with `latents_of(x)` after its last step."""
        vae, late = self.driver.pipeline.vae, ExitStack()

        def put(step):
            step.skip()
            if step.child or step.k < self.steps - 1:
                return step.sample
            # Only now: what comes before the last step, pictures to start from and the denoiser, is in the pipeline's own precision.
            late.enter_context(in_float32(vae))
            return latents_of(step.sample.to(torch.promote_types(self.dtype, torch.float32)))

        with late, torch.autocast(device_of(vae).type, enabled=False):
            return self.driver.drive(self.condition, put, needs_denoiser=lambda k: False, output_type=output_type)


class Layouts(OfDriver):
    """The layouts of a driver's pipeline, each found once: for a size of images and the names of the pictures that the call gets beside the prompts.

    Of one picture, a call keeps the same part whatever it shows (the first frame of a video, or nothing). What it keeps of several may lie in one of them, a
    mask: then each condition is looked at.
    """

    def __init__(self, driver: Driver):
        super().__init__(driver)
        self._known: dict[tuple, LatentLayout] = {}

    def encode(self, images: Tensor, condition: Condition | None) -> Tensor:
        """Images (B, 3, H, W) or (B, F, 3, H, W) in [0, 1] to the pipeline's latents; None: under a condition that has nothing but the driver's own arguments.

        Raises:
            ValueError: see `LatentLayout.find`; a condition that holds a part, of another number of samples.
        """
        given = _pictures(self.driver.call_kwargs if condition is None else {**condition.kwargs, **condition.per_sample})
        place = tuple(images.shape[1:]), given
        if place in self._known and len(given) < 2:
            return self._known[place].encode(images)
        condition = condition or self.driver.any_condition(len(images))
        first = None
        if not (len(given) > 1 and holds_a_part(self.driver, condition)):
            first = self._known.get(place) or LatentLayout.find(self.driver, condition.select([0]), images[:1])
            if not first.held.any():
                self._known[place] = first
                return first.encode(images)
        rows = [condition.of_samples(len(images), "images").select([i]) for i in range(len(images))]  # each sample holds its own
        layouts = [first if i == 0 and first else LatentLayout.find(self.driver, row, images[i : i + 1]) for i, row in enumerate(rows)]
        return torch.cat([own.encode(image[None]) for own, image in zip(layouts, images)])


def _pictures(arguments: dict[str, Any]) -> tuple[str, ...]:
    """The names of arguments that have pictures or tensors, of those that are not one a prompt by diffusers' own convention."""

    def is_one(x: Any) -> bool:
        return isinstance(x, Tensor) or hasattr(x, "getpixel") or hasattr(x, "__array__")

    return tuple(sorted(name for name, value in arguments.items() if not belongs_to_samples(name) and any(map(is_one, pytree.tree_leaves(value)))))


@torch.no_grad()
def holds_a_part(driver: Driver, condition: Condition) -> bool:
    """Whether a condition holds a part of what is decoded of any of its samples: two calls that end where the decoding begins. Yes also where the pipeline
    decodes its samples apart, and only the first was seen."""
    if getattr(driver.pipeline, "vae", None) is None:
        return False
    vae = driver.pipeline.vae
    condition = condition if condition.seeds is not None else replace(condition, seeds=list(range(len(condition))))

    def received(value: float) -> Tensor | None:
        found: list[Tensor] = []

        def leave(decode: Callable, z: Tensor, *args: Any, **kwargs: Any):
            found.append(z.double())
            raise Enough

        def put(step) -> Tensor:
            step.skip()
            return step.sample if step.child else torch.full_like(step.sample, value)

        with replaced(vae, "decode", leave), suppress(Enough):
            driver.drive(condition, put, needs_denoiser=lambda k: False, output_type="pt")
        return found[0] if found else None

    zeros, ones = received(0.0), received(1.0)
    return zeros is not None and (len(zeros) % len(condition) != 0 or bool((zeros == ones).any()))


def _probe_index(tail: _Tail, number: int, shift: Tensor, scale: Tensor, held: Tensor, bits: int) -> Tensor:
    """Write each element's index into the latents, digit by digit as the tail's precision allows, and read it after the tail, where it is not held."""
    index = torch.zeros(len(shift), dtype=torch.long, device=shift.device)
    for low in range(0, max(1, (number - 1).bit_length()), bits):
        digits = ((torch.arange(number) >> low) % 2**bits).double() / 2**bits
        received = tail(lambda x, d=digits: d.reshape(x.shape).to(x)).flatten()[~held]
        index += ((received - shift) / scale * 2**bits).round().long() << low
    if len(index.unique()) < len(index) or not bool(((index >= 0) & (index < number)).all()):
        raise ValueError("The pipeline's latents are not a permutation of what vae.decode receives.")
    return index


_HALF = (torch.float16, torch.bfloat16)


@contextmanager
def in_float32(module: nn.Module) -> Iterator[None]:
    """Context: `module`'s half-precision weights are float32; the very weights come back, also after an exception."""
    weights = [tensor for part in modules_of(module) for tensor in (*part._parameters.values(), *part._buffers.values()) if tensor is not None]
    halves = [(tensor, tensor.data) for tensor in weights if tensor.dtype in _HALF]
    try:
        for tensor, data in halves:
            tensor.data = data.float()
        yield
    finally:
        for tensor, data in halves:
            tensor.data = data


def autoencoded(vae, images: Tensor, video: bool) -> Tensor:
    """The autoencoder's latents (B, *Z) of pictures in [0, 1], float32, the mode where it gives a distribution. `video`: whether it takes (B, C, F, H, W)."""
    pixels = images.to(device_of(vae), torch.promote_types(vae.dtype, torch.float32)) * 2 - 1
    if video:
        pixels = pixels.unsqueeze(2) if pixels.ndim == 4 else pixels.transpose(1, 2)
    elif pixels.ndim == 5:
        pixels = pixels.flatten(0, 1)
    channels = vae.config.get("in_channels", vae.config.get("input_channels"))
    if isinstance(channels, int) and channels > 4 and not vae.config.get("patch_size"):
        raise ValueError(
            f"The autoencoder encodes {channels} channels, pictures with more beside them (their depth, say), so pictures alone become no latents."
        )
    if channels == 4:  # of which the fourth says how opaque pictures are
        pixels = torch.cat([pixels, torch.ones_like(pixels[:, :1])], 1)
    with in_float32(vae), torch.autocast(device_of(vae).type, enabled=False):
        encoded = vae.encode(pixels)
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mode()
    return encoded.latents if hasattr(encoded, "latents") else encoded.latent


def check_images(images: Tensor) -> None:
    """Raise a ValueError if these are no images in [0, 1]; what resampling adds beyond is let be."""
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.ndim not in (4, 5) or images.shape[-3] != 3:
        found = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"Images to encode are a tensor (B, 3, H, W), or (B, F, 3, H, W) of videos, of floats in [0, 1]; got {found}.")
    low, high = map(float, images.detach().aminmax())
    if not (low >= -0.1 and high <= 1.1):
        raise ValueError(f"Images to encode lie in [0, 1], got values from {low:.4g} to {high:.4g}: map them there first.")
