"""What a pipeline made of its samples, in the form that rewards get: pictures, videos, sounds, and at which rate those are sampled."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# What pipelines call waveforms in their outputs.
WAVES = ("audios", "audio", "sound", "waveform")
# What configs call the rate of what comes out, the surest first: a vocoder that widens the band has one of what goes in beside it.
RATES = ("output_sampling_rate", "sampling_rate", "sample_rate")


@dataclass(frozen=True)
class Outcome:
    """What a pipeline made of B samples, as rewards get it.

    Attributes:
        images: pictures (B, 3, H, W) or videos (B, F, 3, H, W) in [0, 1], or sounds (B, C, T) in [-1, 1].
        audio: (B, C, T) in [-1, 1], what is heard with the videos; None where there is nothing, or where it is not known.
        sampling_rate: of the sound, values a second; None without sound.
    """

    images: Tensor
    audio: Tensor | None = None
    sampling_rate: int | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: slice | list[int]) -> Outcome:
        """Of some of the samples."""
        return replace(self, images=self.images[rows], audio=None if self.audio is None else self.audio[rows])

    def to(self, *target: Any) -> Outcome:
        """On another device or in another precision."""
        return replace(self, images=self.images.to(*target), audio=None if self.audio is None else self.audio.to(*target))

    def beside(self, columns: dict[str, Any]) -> dict[str, Any]:
        """The data set's columns, and the sound's entries for rewards that declare them.

        Raises:
            ValueError: a column is called like one of those.
        """
        own = {name: value for name, value in (("audio", self.audio), ("sampling_rate", self.sampling_rate)) if value is not None}
        if taken := sorted(set(own) & set(columns)):
            raise ValueError(f"The data set's column {taken[0]!r} is called like what rewards get of the pipeline's sound: rename the column.")
        return {**columns, **own}


def outcome(pipeline: Any, output: Any) -> Outcome:
    """The `Outcome` of a pipeline's output for `output_type="pt"`.

    Raises:
        ValueError: there is sound in it, and nothing says at which rate it is sampled.
    """
    images = images_of(output)
    name = _main(output)
    audio = None if name in WAVES else _beside(output, name, len(images))
    if name not in WAVES and audio is None:
        return Outcome(images)
    rate = output["sampling_rate"] if "sampling_rate" in _names(output) else None
    return Outcome(images, audio, int(rate) if rate else sampling_rate_of(pipeline))


def by_sample(made: Outcome, number: int) -> Outcome:
    """The outcome with a row for each of `number` samples: several pictures of each, one behind the other, become frames (B, F, 3, H, W)."""
    images = made.images
    if not isinstance(images, Tensor) or images.ndim != 4 or len(images) == number or len(images) % number:
        return made
    return replace(made, images=images.reshape(number, -1, *images.shape[1:]))


def images_of(output: Any) -> Tensor:
    """The pictures (B, 3, H, W) or videos (B, F, 3, H, W) in [0, 1], or the sounds (B, C, T) in [-1, 1], of a pipeline's output for
    `output_type="pt"`.

    A single video without an axis of samples gets it. What is transparent lies on white. Some pipelines know no "pt" and give arrays (B, H, W, 3), without
    a gradient. Sound of one channel that comes as (B, T) gets its channel, and what an autoencoder makes beyond [-1, 1] is clamped, as files do; it passes
    no gradient.
    """
    images, name = in_range(output, _tensor(output[0])), _main(output)
    if name == "frames" and isinstance(images, Tensor) and images.ndim == 4:  # of the only sample that such a pipeline makes
        images = images[None]
    return waveforms(images) if name in WAVES else images


def check_seen(pipeline: Any, images: Tensor) -> Tensor:
    """The images.

    Raises:
        ValueError: they are none, nor sounds.
    """
    if isinstance(images, Tensor) and (images.ndim < 3 or (images.ndim > 3 and images.shape[-3] not in (1, 3))):
        raise ValueError(
            f"{type(pipeline).__name__} makes no pictures, but {tuple(images.shape)} from which another pipeline makes some: take trajectory.final "
            "for it, and give rewards what that one decodes."
        )
    return images


def on_white(images: Tensor) -> Tensor:
    """Pictures (..., 4, H, W) whose fourth channel says how opaque they are, as (..., 3, H, W) on white."""
    colours, opaque = images.split([3, 1], -3)
    return colours * opaque + (1 - opaque)


def waveforms(sound: Tensor) -> Tensor:
    """(B, C, T) or (B, T) as (B, C, T) in [-1, 1]."""
    return (sound[:, None] if sound.ndim == 2 else sound).clamp(-1, 1)


def sampling_rate_of(pipeline: Any) -> int:
    """Values a second of the sound that a pipeline makes: of its vocoder or else of the autoencoder that decodes it, or of a denoiser that needs
    neither, by their configs, or its own attribute `sampling_rate` or `sample_rate`.

    Raises:
        ValueError: none of them says.
    """
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    makers = [parts["vocoder"]] if "vocoder" in parts else []
    makers += [part for part in parts.values() if hasattr(part, "decode") and part not in makers]
    for source in (*(makers or parts.values()), pipeline):  # without any, the denoiser makes the sound itself
        config = source if source is pipeline else getattr(source, "config", {})
        for field in RATES:
            rate = config.get(field) if isinstance(config, dict) else getattr(config, field, None)
            if isinstance(rate, (int, float)) and rate > 0:
                return int(rate)
    raise ValueError(
        f"Nothing of this {type(pipeline).__name__} says at which rate its sound is sampled, if it makes any: neither the config of "
        f"{', '.join(type(part).__name__ for part in makers) or 'a vocoder or an autoencoder (it has none)'} nor the pipeline's attribute `sampling_rate`. "
        "If it makes sound, say so: pipe.sampling_rate = 44100."
    )


def _main(output: Any) -> str | None:
    """What the first entry is called; None of a tuple, whose entries have no names."""
    if isinstance(output, (tuple, list)):
        return None
    return getattr(output, "main", None) or next(iter(output), None)


def _names(output: Any) -> set[str]:
    """Of what a pipeline hands out."""
    if isinstance(output, (tuple, list)):
        return set()
    return set(output) & set(getattr(output, "made", None) or output)  # blocks that were not chosen made nothing


def _beside(output: Any, main: str | None, number: int) -> Tensor | None:
    """The waveforms (B, C, T) that come with the first entry."""
    name = next((name for name in WAVES if name != main and name in _names(output) and output[name] is not None), None)
    if name is None:
        return None
    sound = _tensor(output[name])
    return waveforms(sound[None] if sound.ndim == 2 and len(sound) != number else sound)


def _tensor(images: Any) -> Any:
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(images)
        images = images.movedim(-1, -3) if images.ndim > 3 else images
    elif isinstance(images, (list, tuple)) and all(isinstance(image, Tensor) for image in images):
        images = torch.stack(list(images))
    if not isinstance(images, Tensor) or images.ndim < 4:
        return images
    if images.shape[-3] == 1:  # a depth, a mask: grey
        return images.expand(*images.shape[:-3], 3, *images.shape[-2:])
    return on_white(images) if _is_transparent(images) else images


def in_range(output: Any, images: Any) -> Any:
    """The first entry in [0, 1], where the output's own documentation says that it lies in [-1, 1] (the directions of surfaces)."""
    name, said = _main(output), type(output).__doc__ or ""
    own = re.search(rf"^\s*{name} \(.*?(?=^\s*\w+ \(|\Z)", said, re.MULTILINE | re.DOTALL) if name and name not in WAVES else None
    return images / 2 + 0.5 if own and "[-1, 1]" in own[0] and isinstance(images, Tensor) else images


def _is_transparent(images: Tensor) -> bool:
    """Whether they are pictures with a fourth channel; latents of four have values beyond [0, 1]."""
    return images.shape[-3] == 4 and not bool(((images < 0) | (images > 1)).any())
