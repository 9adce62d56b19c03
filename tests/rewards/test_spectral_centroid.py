"""The spectral centroid: of a sine its frequency, of noise the middle, of silence nothing."""

import math

import pytest
import torch

from diffusers_align.rewards import load_reward, score
from diffusers_align.rewards.spectral_centroid import spectral_centroid

RATE = 16000


def sine(frequency, seconds=0.5, rate=RATE, amplitude=0.5):
    return amplitude * torch.sin(2 * math.pi * frequency * torch.arange(int(seconds * rate)) / rate)


@pytest.mark.parametrize("frequency", [220.0, 440.0, 3000.0, 7000.0])
@pytest.mark.parametrize("rate", [16000, 44100])
def test_a_sine_has_its_frequency(frequency, rate):
    sounds = torch.stack([sine(frequency, rate=rate), sine(frequency, rate=rate, amplitude=0.01)])[:, None].expand(2, 2, -1)
    assert score(load_reward("spectral_centroid"), sounds, ["a", "b"], sampling_rate=rate)["reward"].tolist() == pytest.approx([frequency / 1000] * 2, rel=2e-3)


def test_two_sines_lie_between_them_by_their_power():
    sounds = (sine(1000, amplitude=0.2) + sine(5000, amplitude=0.4))[None, None]
    assert float(spectral_centroid(sounds, ["x"], RATE)) == pytest.approx((1 * 1 + 4 * 5) / 5, rel=2e-3)
    channels = torch.stack([sine(1000), sine(3000)])[None]
    assert float(spectral_centroid(channels, ["x"], RATE)) == pytest.approx(2.0, rel=2e-3)


def test_noise_lies_in_the_middle_and_the_rate_scales_it():
    noise = torch.randn(1, 1, RATE, generator=torch.Generator().manual_seed(0))
    assert float(spectral_centroid(noise, ["x"], RATE)) == pytest.approx(4.0, rel=0.03)
    assert float(spectral_centroid(noise, ["x"], 2 * RATE)) == pytest.approx(2 * float(spectral_centroid(noise, ["x"], RATE)))


def test_silence_has_no_score_and_neither_has_what_is_not_finite():
    sounds = torch.stack([sine(440), torch.zeros(8000), sine(440)])[:, None]
    sounds[2, 0, 4000] = math.inf
    assert spectral_centroid(sounds, ["x"] * 3, RATE).isnan().tolist() == [False, True, True]


def test_its_gradient_makes_a_sound_brighter():
    sounds = (sine(440) + 0.1 * sine(4000))[None, None].requires_grad_()
    before = spectral_centroid(sounds, ["x"], RATE)
    before.sum().backward()
    after = spectral_centroid(sounds.detach() + 100 * sounds.grad, ["x"], RATE)
    assert sounds.grad.isfinite().all() and float(after) > float(before.detach()) + 0.02


@pytest.mark.parametrize("length", [4, 5, 100, 2047, 2049, 2560])
def test_short_sounds_have_a_score(length):
    assert 0 <= float(spectral_centroid(torch.randn(1, 1, length), ["x"], RATE)) <= RATE / 2000


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 100), (2, 1, 3)])
def test_what_is_no_sound_is_refused(shape):
    with pytest.raises(ValueError, match=r"Sounds are \(B, C, T\) with T of 4 or more"):
        spectral_centroid(torch.rand(shape), ["x", "y"], RATE)
