"""DPOK: its loss and both forms of its KL."""

import math

import pytest
import torch
from tiny_pipelines import FAMILIES

from diffusers_align import GaussianTransition, Policy
from diffusers_align.algorithms.dpok import describe_kl, dpok_loss, output_mse, output_weight


def float64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# the loss


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        # 10 * surrogate + 0.01 * kl, with ratios exp(+-0.5/1024), exp(+-0.05/1024) and a clip of 1e-4
        ("ppo", [-20.002 + 0.003, -19.990236758797730787 + 0.003, 10.004884004786944731 + 0.003, 9.999 + 0.003, -20.000976586342245966 + 0.003]),
        ("clamp", [-20.002 + 0.003, -19.998 + 0.003, 10.001 + 0.003, 9.999 + 0.003, -20.000976586342245966 + 0.003]),
    ],
)
def test_loss_at_the_papers_defaults(mode, expected):
    log_ratio, advantage = float64(0.5, -0.5, 0.5, -0.5, 0.05), float64(2, 2, -1, -1, 2)
    loss = dpok_loss(log_ratio - 7, torch.full_like(log_ratio, -7), advantage, float64(0.3), per_dim=1024, clip_mode=mode)
    torch.testing.assert_close(loss, float64(*expected), rtol=1e-13, atol=0)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("log_ratio", [0.5, -0.5, 0.1])
def test_clamp_forgets_samples_beyond_the_clip_and_ppo_brings_back_those_on_the_wrong_side(log_ratio, advantage):
    gradients = {}
    for mode in ("ppo", "clamp"):
        log_prob = float64(log_ratio).requires_grad_()
        loss = dpok_loss(log_prob, float64(0), float64(advantage), per_dim=1, clip_range=0.2, clip_mode=mode, reward_weight=3.0)
        gradients[mode] = torch.autograd.grad(loss.sum(), log_prob)[0].item()
    bare, inside = -3 * advantage * math.exp(log_ratio), abs(log_ratio) < 0.2
    assert gradients["clamp"] == pytest.approx(bare if inside else 0.0)
    assert gradients["ppo"] == pytest.approx(bare if inside or log_ratio * advantage < 0 else 0.0)


def test_the_kl_has_its_own_weight_and_gradient():
    kl = float64(0.5, 2.0).requires_grad_()
    loss = dpok_loss(randn(2), randn(2), randn(2, seed=1), kl, per_dim=4, kl_weight=0.25)
    assert torch.autograd.grad(loss.sum(), kl)[0].tolist() == [0.25, 0.25]


# the two forms of the KL


def test_output_weight_and_mse_recover_what_the_mean_was_made_of():
    state, output, reference = randn(3, 2, 4), randn(3, 2, 4, seed=1), randn(3, 2, 4, seed=2)

    def mean(x, e):
        return 0.9 * x - 0.3 * e

    weight = output_weight(lambda e: mean(torch.zeros_like(e), e), 3)
    assert weight == pytest.approx(-0.3)
    found = output_mse(mean(state, output), mean(state, reference), weight)
    torch.testing.assert_close(found, (output - reference).square().mean((1, 2)), rtol=1e-6, atol=0)


def test_a_step_that_clips_has_no_output_weight():
    with pytest.raises(ValueError, match="not affine.*--kl_form paper"):
        output_weight(lambda e: 0.5 * e.clamp(-1, 1) + 0.1 * e, 4)


@pytest.mark.parametrize("family", ["sd15", "sd15_v", "sd3", "flux_true_cfg"])
def test_the_official_form_is_the_error_of_the_guided_outputs(family):
    """With guidance, at every step: from the means alone, without knowing what the model predicts."""
    policy = Policy(FAMILIES[family].build(), **FAMILIES[family].call)
    trajectory = policy.rollout(["a cat", "a large red dog"], seeds=[1, 2])
    torch.manual_seed(1)
    for parameter in policy.add_lora(rank=4):
        parameter.data.normal_(std=0.3)
    outputs: list[list[torch.Tensor]] = []

    def record(step):
        outputs[-1].append(step.model_output.float())
        return trajectory.actions[:, step.k]

    def means():
        outputs.append([])
        with torch.no_grad():
            policy.drive(trajectory.condition, record)
        return policy.transitions(trajectory)

    moved = means()
    with policy.reference():
        pretrained = means()
    scheduler = policy.scheduler
    assert list(moved) == list(pretrained) and len(moved) >= 2
    for k in moved:
        weight = output_weight(lambda e: scheduler.transition(e, trajectory.timesteps[k], torch.zeros_like(e)).mean, trajectory.final.ndim)  # noqa: B023
        expected = (outputs[0][k] - outputs[1][k]).square().flatten(1).mean(1)
        assert expected.min() > 1e-4
        torch.testing.assert_close(output_mse(moved[k].mean, pretrained[k].mean, weight), expected, rtol=2e-3, atol=1e-6)


def test_the_paper_form_is_the_official_one_at_another_scale():
    output, reference, weight, std = randn(2, 6), randn(2, 6, seed=1), -0.3, torch.full((1, 1), 0.4, dtype=torch.float64)
    mine, theirs = GaussianTransition(weight * output, std), GaussianTransition(weight * reference, std)
    paper, official = mine.kl(theirs) / 6, output_mse(mine.mean, theirs.mean, weight)
    scale = weight**2 / (2 * 0.4**2)
    torch.testing.assert_close(paper, (weight * (output - reference)).square().mean(1) / (2 * 0.4**2))
    torch.testing.assert_close(paper, scale * official)
    assert f"like {0.01 / scale:.3g} on the paper's" in describe_kl(0.01, [0.5 * scale, 1.5 * scale])
