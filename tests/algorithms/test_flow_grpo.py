"""Flow-GRPO's KL penalties."""

import math

import pytest
import torch
from moved_policy import SHAPE, randn

from diffusers_align import FlowMatchSDEScheduler
from diffusers_align.algorithms.flow_grpo import describe_kl, gaussian_kl, kl_penalty, official_kl


def test_the_kl_penalty_has_three_forms():
    mean, reference, std = randn(*SHAPE), randn(*SHAPE, seed=1), torch.full((1, 1, 1, 1), 0.4, dtype=torch.float64)
    assert torch.equal(kl_penalty(mean, reference, std, 0.1, form="gaussian"), gaussian_kl(mean, reference, std))
    assert torch.equal(kl_penalty(mean, reference, std, 0.1), official_kl(mean, reference, std, 0.1))
    published = ((mean - reference) ** 2).mean(dim=tuple(range(1, mean.ndim)))  # FlowCPS, b402c7a, train_sd3.py
    torch.testing.assert_close(kl_penalty(mean, reference, std, 0.1, form="mean_squared"), published)
    torch.testing.assert_close(gaussian_kl(mean, reference, std), published / (2 * 0.4**2))
    with pytest.raises(ValueError, match="Unknown form 'exact' of the KL; choose one of official, gaussian, mean_squared"):
        kl_penalty(mean, reference, std, 0.1, form="exact")


def test_flow_grpos_kl_would_weigh_the_last_step_of_cps_a_thousandfold():
    scheduler = FlowMatchSDEScheduler(shift=3.0, sde_type="cps", noise_level=0.8)
    scheduler.set_timesteps(10)
    sigmas, factors = scheduler.sigmas.tolist(), []
    for sigma, after in zip(sigmas[:9], sigmas[1:10]):
        mean, reference, std = randn(*SHAPE), randn(*SHAPE, seed=1), torch.full((1, 1, 1, 1), after * math.sin(0.4 * math.pi), dtype=torch.float64)
        official, squared = (kl_penalty(mean, reference, std, sigma - after, form=form) for form in ("official", "mean_squared"))
        factors.append(float((official / squared).mean()))
    assert factors == pytest.approx([0.024, 0.031, 0.042, 0.060, 0.092, 0.16, 0.35, 1.34, 1870], rel=0.03)


def test_the_penalty_is_said_in_the_other_forms_weight_and_without_step_lengths_as_it_is():
    assert "like 0.0133 on the gaussian one at the mean step of 0.333" in describe_kl(0.04, "official", [1 / 3] * 3)
    assert describe_kl(0.004, "gaussian", [float("nan")] * 3) == "kl_weight 0.004 weighs the exact Gaussian KL of each step, in nats per dimension"
