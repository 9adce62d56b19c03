"""Sound for people: a spectrogram to look at, and WAV files to listen to."""

from __future__ import annotations

import wave
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

ROWS, COLUMNS = 128, 256
WINDOW = 512
RANGE = 80.0
# Colours from silence to full scale, each lighter than the one before.
COLORS = ((0.0, 0.0, 0.0), (0.2, 0.1, 0.5), (0.75, 0.25, 0.35), (1.0, 0.7, 0.2), (1.0, 1.0, 0.9))


def spectrogram(sound: Tensor) -> Tensor:
    """(3, 128, 256) in [0, 1] of a sound (C, T): time from left to right, frequencies from 0 at the bottom to half the sampling rate at the top, the
    mean power of the channels from 80 dB below full scale, black, to full scale, white. Of what falls into a pixel it shows the loudest. Where a
    value is not finite, so is the picture (and `to_pil` shows that).

    Raises:
        ValueError: no sound, or not one value.
    """
    if sound.ndim != 2 or sound.shape[-1] < 1:
        raise ValueError(f"A sound is (C, T) with at least one value, got the shape {tuple(sound.shape)}.")
    sound = F.pad(sound.detach().float().cpu(), (0, max(0, 4 - sound.shape[-1])))
    width = min(WINDOW, sound.shape[-1])
    hop, window = max(1, width // 4), torch.hann_window(width)
    spectrum = torch.stft(sound.nan_to_num(0, 0, 0), width, hop, window=window, pad_mode="constant", return_complex=True)
    decibels = 10 * (2 * spectrum.abs() / window.sum()).square().mean(0).clamp(min=1e-12).log10()  # 0 of a sine at full scale
    level = F.adaptive_max_pool2d((decibels / RANGE + 1).clamp(0, 1).flip(0)[None], (ROWS, COLUMNS))[0]
    broken = F.adaptive_max_pool1d((~sound.isfinite()).any(0).float()[None], COLUMNS)[0] > 0
    return torch.where(broken, torch.nan, _colored(level))


def _colored(level: Tensor) -> Tensor:
    """(3, H, W) of (H, W) in [0, 1]."""
    stops, place = torch.tensor(COLORS), level * (len(COLORS) - 1)
    below = place.long().clamp(max=len(COLORS) - 2)
    share = (place - below)[..., None]
    return (stops[below] * (1 - share) + stops[below + 1] * share).permute(2, 0, 1)


def write_wav(path: Path, sound: Tensor, sampling_rate: int) -> None:
    """A sound (C, T) in [-1, 1] as a WAV file of 16 bits. Values that are not finite are silent there."""
    values = sound.detach().float().cpu().nan_to_num(0, 0, 0).clamp(-1, 1).mul(2**15 - 1).round().to(torch.int16)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(values))
        file.setsampwidth(2)
        file.setframerate(sampling_rate)
        file.writeframes(values.T.contiguous().numpy().astype("<i2").tobytes())


def sounds_of(evaluation) -> list[Tensor]:
    """What is heard of an evaluation's samples, (C, T) each: of videos their sound; nothing of pictures."""
    return evaluation.audio or [image for image in evaluation.images if image.ndim == 2]


def noun(evaluation) -> str:
    """What its samples are, in words."""
    return "sounds" if evaluation.images and evaluation.images[0].ndim == 2 else "images"


def write_sounds(folder: Path, evaluation) -> None:
    """The sounds of an evaluation as `1.wav`, `2.wav` and so on, in the order of its samples; no folder where there are none."""
    sounds = sounds_of(evaluation)
    if sounds:
        folder.mkdir(parents=True, exist_ok=True)
    for number, sound in enumerate(sounds, 1):
        write_wav(folder / f"{number}.wav", sound, evaluation.sampling_rate)


def captions_of(evaluation) -> list[str]:
    """The prompts of an evaluation's pictures; those of spectrograms with what their axes span."""
    texts = evaluation.prompts[: len(evaluation.images)]
    if noun(evaluation) != "sounds":
        return texts
    rate = evaluation.sampling_rate
    return [f"{text} ({image.shape[-1] / rate:.3g} s, up to {rate / 2000:.3g} kHz)" for text, image in zip(texts, evaluation.images)]
