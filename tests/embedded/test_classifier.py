"""The classifier of scenes, and the judge."""

import pytest
import torch

from diffusers_align import embedded
from diffusers_align.embedded import scenes
from diffusers_align.embedded.classifier import SceneClassifier
from diffusers_align.embedded.scene_judge import SceneJudge
from diffusers_align.embedded.teaching import make_scenes


# The judge has half as many weights, and counts less surely.
@pytest.mark.parametrize("name, network, counts", [("scene-classifier", SceneClassifier, 0.95), ("scene-judge", SceneJudge, 0.9)])
def test_both_networks_read_real_scenes(name, network, counts):
    images, truth, centers = make_scenes(300, seed=12345)
    with torch.no_grad():
        predicted = network.from_pretrained(embedded.path(name))(images.float() / 255)
    labels = {
        "object": [list(scenes.OBJECTS).index(s.object) for s in truth],
        "color": [list(scenes.COLORS).index(s.color) for s in truth],
        "count": [s.count - 1 for s in truth],
    }
    accuracy = {name: (predicted[name].argmax(1) == torch.tensor(label)).float().mean() for name, label in labels.items()}
    assert accuracy.pop("count") > counts and min(accuracy.values()) > 0.95, accuracy
    assert float((predicted["center"] - centers).abs().mean()) < 0.03
