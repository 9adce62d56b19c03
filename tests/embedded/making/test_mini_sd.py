"""Which noise levels mini-sd learns from, and how much."""

import torch

from diffusers_align.embedded.making.mini_sd import MAX_WEIGHT, build_scheduler, where_layout_is_decided


def test_timesteps_are_drawn_where_layout_is_decided():
    alphas = build_scheduler().alphas_cumprod
    shares, _ = where_layout_is_decided(alphas)
    assert shares.shape == (1000,) and shares.min() > 0 and abs(shares.sum().item() - 1) < 1e-5
    log_snr = (alphas / (1 - alphas)).log()
    middle = (shares * log_snr)[100:].sum() / shares[100:].sum()
    assert -2.5 < middle < -0.5
    assert shares[300:600].sum() > 0.4 and shares[800:].sum() < 0.05


def test_an_error_of_the_noise_costs_what_it_costs_the_velocity():
    scheduler = build_scheduler()
    _, weights = where_layout_is_decided(scheduler.alphas_cumprod)
    torch.manual_seed(0)
    x0, noise, error = torch.randn(3, 4, 4, 16, 16).unbind()
    for t in (10, 300, 500):
        alpha = scheduler.alphas_cumprod[t]
        noised = alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise
        wrong = noise + 0.1 * error
        wrong_x0 = (noised - (1 - alpha).sqrt() * wrong) / alpha.sqrt()
        velocity = lambda eps, x: alpha.sqrt() * eps - (1 - alpha).sqrt() * x  # noqa: B023, E731
        expected = (velocity(wrong, wrong_x0) - velocity(noise, x0)).square().mean()
        torch.testing.assert_close(weights[t] * (wrong - noise).square().mean(), expected, rtol=1e-3, atol=1e-6)
    assert weights[900] == MAX_WEIGHT
