"""Flow-CPS: its ratio and its loss."""

import math

import pytest
import torch
from moved_policy import D, step

from diffusers_align.algorithms.flow_cps import cps_log_ratio, flow_cps_loss


@pytest.mark.parametrize("std_rows", [1, 6])
def test_the_cps_ratio_is_the_official_one(std_rows):
    new, old, action = step(std_rows=std_rows)
    # IamCreateAI/FlowCPS: log_prob = -((prev_sample - prev_sample_mean) ** 2).mean(non-batch)
    official = (action - old.mean).square().mean((1, 2, 3)) - (action - new.mean).square().mean((1, 2, 3))
    torch.testing.assert_close(cps_log_ratio(new.log_prob(action), old.log_prob(action), new.std, per_dim=D), official, rtol=1e-9, atol=1e-12)


def test_the_cps_loss_at_its_published_clip_range():
    log_prob, old, std = (
        torch.tensor([0.6, -0.6, 1.2e-4], dtype=torch.float64),
        torch.zeros(3, dtype=torch.float64),
        torch.full((1, 1), 0.5, dtype=torch.float64),
    )
    advantage = torch.tensor([2.0, 2.0, -1.0], dtype=torch.float64)
    ratio = [math.exp(2 * 0.25 * x / 12) for x in (0.6, -0.6, 1.2e-4)]
    expected = torch.tensor([-2 * (1 + 1e-5), -2 * ratio[1], ratio[2]], dtype=torch.float64)  # clipped; wrong side; within the range
    torch.testing.assert_close(flow_cps_loss(log_prob, old, advantage, std, per_dim=12), expected, rtol=1e-12, atol=0)
