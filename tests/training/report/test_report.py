"""What a report calls its prompts and its rewards."""

import math
from types import SimpleNamespace

import pytest
import torch

from diffusers_align.training.online.sampling import Evaluation
from diffusers_align.training.report.report import _summary, judged_on, trained_on_too


@pytest.mark.parametrize(
    "judged, expected",
    [("ab", "held-out prompts"), ("xy", "the training prompts"), ("aaxb", "3 prompts (1 of them trained on)")],
)
def test_only_held_out_prompts_are_called_so(judged, expected):
    assert judged_on(iter(judged), {"x", "y", "z"}) == expected


def test_rewards_go_by_their_own_names_and_missing_scores_are_told():
    nan, two = math.nan, torch.tensor([0.25, 0.75])
    scores = {
        "reward": two,
        "reward/count": torch.tensor([0.5, nan]),
        "reward/position": torch.tensor([nan, nan]),
        "rewards.py:judge": torch.tensor([nan, 1.0]),
    }
    evaluation = Evaluation(["a", "b"], [0, 1], [], scores)
    found = _summary(evaluation, "scene_score", ["reward", "rewards.py:judge"])
    assert found == "scene_score 0.5000 ± 0.2500, scene_score/count 0.5000, rewards.py:judge 1.0000 (1 of 2 without a score)"
    alone = Evaluation(["a", "b"], [0, 1], [], {"rewards/mine": two})
    assert _summary(alone, None, ["rewards/mine"]) == "rewards/mine 0.5000 ± 0.2500"
    below = Evaluation(["a", "b"], [0, 1], [], {"reward/mine": two})
    assert _summary(below, None, ["reward/mine"]) == "reward/mine 0.5000 ± 0.2500", "a folder may be called so"


@pytest.mark.parametrize(
    ("reward", "eval_reward", "models", "shared"),
    [
        ("scene_score", "scene_score", (None, None), "scene_score"),
        ("background_color+scene_score", "scene_score*2", (None, None), "scene_score"),
        ("clip_score", "clip_score", (None, "mini-clip"), None),
        ("scene_score", "scene_judge", (None, None), None),
        ("scene_score", None, (None, None), None),
        (None, "scene_score", (None, None), None),
    ],
)
def test_a_second_reward_that_is_trained_on_is_said(reward, eval_reward, models, shared):
    said = trained_on_too(SimpleNamespace(reward=reward, eval_reward=eval_reward, reward_model=models[0], eval_reward_model=models[1]))
    assert len(said) == (shared is not None)
    assert not said or f"--eval_reward {eval_reward} is trained on: {shared} is in --reward {reward}." in said[0]
