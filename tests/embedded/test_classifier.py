"""The classifier of scenes."""

import torch

from diffusers_align import embedded
from diffusers_align.embedded import scenes
from diffusers_align.embedded.classifier import SceneClassifier
from diffusers_align.embedded.teaching import make_scenes


def test_the_classifier_reads_real_scenes():
    images, truth, centers = make_scenes(300, seed=12345)
    classifier = SceneClassifier.from_pretrained(embedded.path("scene-classifier"))
    with torch.no_grad():
        predicted = classifier(images.float() / 255)
    accuracy = {
        "object": (predicted["object"].argmax(1) == torch.tensor([list(scenes.OBJECTS).index(s.object) for s in truth])).float().mean(),
        "color": (predicted["color"].argmax(1) == torch.tensor([list(scenes.COLORS).index(s.color) for s in truth])).float().mean(),
        "count": (predicted["count"].argmax(1) == torch.tensor([s.count - 1 for s in truth])).float().mean(),
    }
    assert min(accuracy.values()) > 0.95, accuracy
    assert float((predicted["center"] - centers).abs().mean()) < 0.03
