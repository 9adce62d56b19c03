"""The scene score: does the image show what was asked?"""

import random

import numpy as np
import pytest
import torch
from torch import nn

from diffusers_align.embedded import scenes
from diffusers_align.rewards import InvalidReward, load_reward, score
from diffusers_align.rewards.scene import SceneScore


class FakeClassifier(nn.Module):
    """Always sees two cats, probability 0.8 and 0.6, on a red background (0.9), centred at (0.38, 0.5)."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images):
        def logits(classes, chosen, probability):
            rest = (1 - probability) / (len(classes) - 1)
            values = [probability if name == chosen else rest for name in classes]
            return torch.tensor(values).log().expand(len(images), -1) + self.weight

        return {
            "object": logits(scenes.OBJECTS, "cat", 0.8),
            "count": logits(scenes.COUNTS, 2, 0.6),
            "color": logits(scenes.COLORS, "red", 0.9),
            "center": torch.tensor([[0.38, 0.5]]).expand(len(images), -1),
        }


def test_scene_score_is_the_mean_probability_of_what_was_asked():
    reward = SceneScore()
    reward.classifier = FakeClassifier()
    prompts = ["two cats", "two cats on a red background", "a cat on the left", "two dogs on a blue background", "two cats on the left", "an idea"]
    result = score(reward, torch.rand(6, 3, 32, 32), prompts, on_invalid="mask")
    left = torch.sigmoid(torch.tensor(1.0)).item()  # (0.41 - 0.38) / 0.03
    other = [0.2 / 31, 0.2, 0.1 / 9]
    rewards = [(0.8 + 0.6) / 2, (0.8 + 0.6 + 0.9) / 3, (0.8 + other[1] + left) / 3, (other[0] + 0.6 + other[2]) / 3, (0.8 + 0.6 + left) / 3, float("nan")]
    assert result["reward"].tolist() == pytest.approx(rewards, nan_ok=True, abs=1e-5)
    assert result["correct"].tolist() == pytest.approx([1, 1, 0, 0, 1, float("nan")], nan_ok=True)
    assert result["object"].tolist() == pytest.approx([0.8] * 3 + [other[0], 0.8, float("nan")], nan_ok=True, abs=1e-5)
    assert result["color"].isnan().tolist() == [True, False, True, False, True, True]
    assert result["position"].tolist() == pytest.approx([float("nan")] * 2 + [left, float("nan"), left, float("nan")], nan_ok=True, abs=1e-5)
    with pytest.raises(InvalidReward, match="'scene_score' is NaN or infinite for 1 of 6 images. Prompts: 'an idea'"):
        score(reward, torch.rand(6, 3, 32, 32), prompts)


@pytest.mark.parametrize("position, center", [("left", (0.2, 0.5)), ("right", (0.8, 0.5)), ("top", (0.5, 0.2)), ("bottom", (0.5, 0.8))])
def test_positions_are_where_they_say(position, center):
    reward = SceneScore()
    fake = FakeClassifier()
    reward.classifier = fake
    see = fake.forward
    fake.forward = lambda images: see(images) | {"center": torch.tensor([center]).expand(len(images), -1)}
    prompts = [f"a cat {phrase}" for phrase in scenes.POSITIONS.values()]
    found = score(reward, torch.rand(4, 3, 32, 32), prompts)["position"]
    assert ((found > 0.99) == torch.tensor([name == position for name in scenes.POSITIONS])).all()
    assert found[[name != position for name in scenes.POSITIONS]].max() < 0.06


def test_scene_score_knows_rendered_scenes():
    rng = random.Random(5)
    drawn = [scenes.sample_scene(rng) for _ in range(64)]
    images = torch.stack([torch.from_numpy(np.array(scenes.render(scene, rng))).permute(2, 0, 1) / 255 for scene in drawn])
    captions = [scene.caption() for scene in drawn]
    reward = load_reward("scene_score")
    with torch.no_grad():
        right, wrong = score(reward, images, captions), score(reward, images, captions[1:] + captions[:1])
    assert right["reward"].mean() > wrong["reward"].mean() + 0.3
    assert right["correct"].mean() > 0.7 and wrong["correct"].mean() < 0.2


def test_scene_score_judges_against_wanted_captions_where_there_are_some():
    from diffusers_align.embedded.teaching import make_scenes

    images, truth, _ = make_scenes(20, seed=5)
    captions, wrong = [s.caption() for s in truth], ["a bus" if s.object != "bus" else "a cat" for s in truth]
    reward = load_reward("scene_score")
    expected = reward(images.float() / 255, captions)["reward"]
    torch.testing.assert_close(reward(images.float() / 255, wrong, wanted=captions)["reward"], expected)
    torch.testing.assert_close(reward(images.float() / 255, captions, wanted=[None] * 20)["reward"], expected)
