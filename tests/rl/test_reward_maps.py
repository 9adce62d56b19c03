"""Maps of rewards: what the reward-gradient losses make of a reward."""

import pytest
import torch

from diffusers_align.algorithms import alignprop, draft, refl, vader
from diffusers_align.rl.reward_maps import RewardMap, distance, hinge, shortfall


def test_reward_maps():
    r = torch.tensor([-1.0, 2.0, 5.0], dtype=torch.float64, requires_grad=True)
    assert hinge(r, margin=2.0).tolist() == [3.0, 0.0, 0.0]
    assert distance(r, target=3.0).tolist() == [4.0, 1.0, 2.0]
    assert shortfall(r).tolist() == [2.0, -1.0, -4.0]
    assert refl.refl_loss(r).tolist() == pytest.approx([3e-3, 0, 0])
    assert refl.refl_loss(r, RewardMap("hinge", 5.0, 1.0)).tolist() == [6.0, 3.0, 0.0]
    assert alignprop.alignprop_loss(r).tolist() == pytest.approx([0.02, -0.01, -0.04])
    assert vader.vader_loss(r).tolist() == [2.0, 1.0, 4.0]
    assert draft.draft_loss(r).tolist() == [1.0, -2.0, -5.0]
    assert draft.low_variance_loss([r, 2 * r, 3 * r], RewardMap("hinge", 3.0)).tolist() == pytest.approx([5.0, 0.0 + 1 / 3, 0.0])


def test_reward_maps_as_values():
    r = torch.tensor([-1.0, 2.0, torch.nan], dtype=torch.float64)
    values = {"none": [1.0, -2.0], "hinge": [2.0, 0.0], "distance": [2.0, 1.0], "shortfall": [2.0, -1.0]}
    for form, expected in values.items():
        mapped = RewardMap(form, None if form == "none" else 1.0, scale=0.5)(r)
        assert mapped[:2].tolist() == [0.5 * e for e in expected] and mapped[2].isnan()
    for form, target, match in (("hinges", 1.0, "Unknown"), ("hinge", None, "needs a target"), ("none", 1.0, "has no target")):
        with pytest.raises(ValueError, match=match):
            RewardMap(form, target)
