"""The classifier of scenes, and the judge."""

import pytest
import torch

from diffusers_align import embedded
from diffusers_align.embedded import scenes
from diffusers_align.embedded.classifier import SceneClassifier
from diffusers_align.embedded.scene_judge import SceneJudge
from diffusers_align.embedded.teaching import make_scenes


@pytest.mark.parametrize("name, network", [("scene-classifier", SceneClassifier), ("scene-judge", SceneJudge)])
def test_both_networks_read_real_scenes(name, network):
    """The judge counts worse, 0.92; its card says so."""
    images, truth, centers = make_scenes(300, seed=12345)
    with torch.no_grad():
        predicted = network.from_pretrained(embedded.path(name))(images.float() / 255)
    labels = {
        "object": [list(scenes.OBJECTS).index(s.object) for s in truth],
        "color": [list(scenes.COLORS).index(s.color) for s in truth],
        "count": [s.count - 1 for s in truth],
    }
    accuracy = {name: (predicted[name].argmax(1) == torch.tensor(label)).float().mean() for name, label in labels.items()}
    assert min(accuracy["object"], accuracy["color"]) > 0.95 and accuracy["count"] > {"scene-classifier": 0.95, "scene-judge": 0.9}[name], accuracy
    assert float((predicted["center"] - centers).abs().mean()) < 0.03
