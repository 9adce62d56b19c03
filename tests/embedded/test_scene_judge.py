"""The judge that is held out."""

import pytest
import torch

from diffusers_align import embedded
from diffusers_align.embedded.classifier import SceneClassifier
from diffusers_align.embedded.making import judges
from diffusers_align.embedded.scene_judge import SceneJudge
from diffusers_align.embedded.teaching import make_scenes


def test_the_judge_shares_nothing_with_the_classifier():
    judge, classifier = SceneJudge.from_pretrained(embedded.path("scene-judge")), SceneClassifier.from_pretrained(embedded.path("scene-classifier"))
    kinds = [{type(module).__name__ for module in network.modules()} for network in (judge, classifier)]
    assert "TransformerEncoderLayer" in kinds[0] - kinds[1] and "ResidualBlock" in kinds[1] - kinds[0]
    halves = [make_scenes(50, seed, **shares)[0] for seed, shares in ((judges.JUDGE_SEED, judges.SHARES), (judges.CLASSIFIER_SEED, {}))]
    assert not (halves[0][:, None] == halves[1][None]).flatten(2).all(2).any()


def test_the_judge_takes_other_sizes_and_has_a_gradient():
    judge = SceneJudge.from_pretrained(embedded.path("scene-judge"))
    images = make_scenes(4, 1)[0].float() / 255
    larger = torch.nn.functional.interpolate(images, scale_factor=2, mode="nearest").requires_grad_()
    found, expected = judge(larger), judge(images)
    assert torch.equal(found["object"].argmax(1), expected["object"].argmax(1))
    assert [found[name].shape for name in ("object", "color", "count", "center")] == [(4, 32), (4, 10), (4, 3), (4, 2)]
    found["count"].sum().backward()
    assert all(gradient.norm() > 0 for gradient in larger.grad)


@pytest.mark.parametrize("size", [32, 16])
def test_an_untrained_judge_answers_in_range(size):
    out = SceneJudge(image_size=size, width=16, depth=1, attention_heads=2)(torch.rand(2, 3, size, size))
    assert out["center"].min() >= 0 and out["center"].max() <= 1
