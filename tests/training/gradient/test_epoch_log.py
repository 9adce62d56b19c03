"""What an epoch of reward gradients logs and clips."""

import argparse
from types import SimpleNamespace

from diffusers_align.training.gradient import epoch_log


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
