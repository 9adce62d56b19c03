r"""The spectral centroid: how bright a sound is, by the mean of its frequencies.

Source: the centroid of the timbre literature, G. Peeters, A large set of audio features for sound description (IRCAM 2004), section 6.1.1. With the power
$P_{kj} = |X_{kj}|^2$ of frame j at the frequency $f_k$, from a Fourier transform under a Hann window of 2048 values (or of all, where there are fewer),
summed over frames and channels,

$$ r = \frac{\sum_k f_k \sum_j P_{kj}}{\sum_k \sum_j P_{kj}} $$

Weighted by power, not by amplitude as Peeters also has it: of a pure tone the window's side lobes then hardly move it, and loud moments count for more
than noise in pauses. Alone it is hacked by a hiss: weigh it against a reward that wants the prompt.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

WINDOW = 2048


def spectral_centroid(sounds: Tensor, prompts: list[str], sampling_rate: int, **columns: Any) -> Tensor:
    """(B,) mean frequency in kHz of sounds (B, C, T), between 0 and half the sampling rate; NaN of silence, and where a value is not finite.
    Differentiable.

    Args:
        sampling_rate: values a second.

    Raises:
        ValueError: no sounds, or too short ones: a frequency takes four values at least.
    """
    if sounds.ndim != 3 or sounds.shape[-1] < 4:
        raise ValueError(f"Sounds are (B, C, T) with T of 4 or more, got the shape {tuple(sounds.shape)}.")
    width = min(WINDOW, sounds.shape[-1])
    window = torch.hann_window(width, device=sounds.device, dtype=sounds.dtype)
    spectrum = torch.stft(sounds.flatten(0, 1), width, max(1, width // 4), window=window, center=False, return_complex=True)
    power = torch.view_as_real(spectrum).square().sum(-1).unflatten(0, sounds.shape[:2]).sum((1, 3))  # (B, frequencies)
    frequencies = torch.linspace(0, sampling_rate / 2000, power.shape[-1], device=sounds.device, dtype=sounds.dtype)
    return (power * frequencies).sum(-1) / power.sum(-1)
