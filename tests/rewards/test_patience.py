"""Waiting for what may never come."""

import time

import pytest
import torch

from diffusers_align.data.prompts import Prompt
from diffusers_align.rewards import RewardError
from diffusers_align.training.online.scoring import OverTime, Scorer, within

ASKED = [Prompt(f"prompt {i}", {"weight": i}) for i in range(4)]


def test_within():
    assert within(None, lambda: 3) == within(5, lambda: 3) == 3
    with pytest.raises(TimeoutError, match="mine"):
        within(5, lambda: (_ for _ in ()).throw(TimeoutError("mine")))
    with pytest.raises(OverTime):
        within(0.05, lambda: time.sleep(1))
    with pytest.raises(RewardError, match="raised TimeoutError: mine"):
        Scorer(lambda images, prompts, **columns: (_ for _ in ()).throw(TimeoutError("mine")), timeout=5)(torch.rand(1, 3, 4, 4), ASKED[:1])
