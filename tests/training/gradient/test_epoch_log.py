"""What an epoch of reward gradients logs and clips."""

import argparse
from types import SimpleNamespace

import pytest
import torch

from diffusers_align.training.gradient import epoch_log


@pytest.mark.parametrize("reward_map, expected", [("hinge", [0.0, 1.0, 1.0]), ("none", None), ("distance", None)])
def test_rewards_beyond_a_hinge_are_counted_whatever_the_method(reward_map, expected):
    log = epoch_log.EpochLog()
    batch = SimpleNamespace(asked=[SimpleNamespace(text=text) for text in "abcd"], reward=SimpleNamespace(failures=[]))
    log.add_rewards(batch, torch.tensor([0.5, torch.nan, 2.0, 1.0]), argparse.Namespace(reward_map=reward_map, reward_target=1.0))
    assert log.get("hinge_inactive") == expected and log["reward"] == [0.5, 2.0, 1.0] and log.unscored == ["b"]


def test_the_clip_follows_the_norms(monkeypatch):
    norms, limits = iter([1.0, 3.0, float("inf"), 2.0, 10.0]), []
    run = SimpleNamespace(
        args=argparse.Namespace(max_grad_norm=5.0, grad_clip_quantile=0.5),
        register=lambda name, it: None,
        optimizer_step=lambda limit: limits.append(limit) or next(norms),
    )
    monkeypatch.setattr(epoch_log, "MIN_NORMS", 2)
    clip = epoch_log.GradientClip(run)
    for _ in range(5):
        clip.step()
    assert limits == [5.0, 5.0, 2.0, 2.0, 2.0]
    again = epoch_log.GradientClip(run)
    again.load_state_dict(clip.state_dict())
    assert again.limit == clip.limit == 2.5
    run.args.grad_clip_quantile = None
    assert clip.limit == 5.0
