"""Does the image show what the prompt asks for? GenEval's question (https://arxiv.org/abs/2310.11513) for embedded scenes.

The attributes (object, count, background colour, position) are read from the prompt by `embedded.scenes.parse` and looked for
in the image by the embedded classifier. The reward is the mean probability of the attributes asked for, which has a gradient
and tells a near miss from a far one; `correct` is GenEval's strict verdict, 1 where all of them are right.

A position is judged by the objects' mean centre, in the image's width and height: left means x < 0.41, right x > 0.59, top
y < 0.41, bottom y > 0.59, and its probability is sigmoid((threshold - coordinate) / 0.03), mirrored for right and bottom.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .preprocessing import flatten_frames, mean_over_frames, repeat_for_frames

THRESHOLD, SHARPNESS = 0.41, 0.03
ATTRIBUTES = ("object", "count", "color", "position")


class SceneScore(nn.Module):
    """Mean probability of the attributes that the prompt names; NaN for a prompt that names no known object. Differentiable.

    Args:
        model: a folder of `SceneClassifier`; the shipped one by default.
    """

    name = "scene_score"
    scores_only = "prompts that name an object that it knows, in the words of the package's sets (`embedded.scenes.OBJECTS`)"

    def __init__(self, model: str | None = None):
        super().__init__()
        self.classifier = self.load(model)
        self.float().eval().requires_grad_(False)

    @staticmethod
    def load(model: str | None) -> nn.Module:
        """The network that looks at the images."""
        from .. import embedded
        from ..embedded.classifier import SceneClassifier

        return SceneClassifier.from_pretrained(model or embedded.path("scene-classifier"))

    def forward(self, images: Tensor, prompts: list[str], **columns: Any) -> dict[str, Tensor]:
        """images: (B, 3, H, W) or (B, F, 3, H, W) in [0, 1]; of a video, everything is the mean over frames.

        A column `wanted` holds captions to judge against in the place of the prompts: preferences that the prompt does not state.

        Returns:
            `reward` (B,) in [0, 1]; `object`, `count`, `color`, `position`: the probability of what was asked, NaN where
            nothing was; `correct`: 1 where all that was asked is right, else 0.
        """
        frames = flatten_frames(images)
        captions = [wish or prompt for wish, prompt in zip(columns.get("wanted") or prompts, prompts)]
        wanted = repeat_for_frames(wanted_classes(captions).to(frames.device), images)
        device = next(self.classifier.parameters()).device
        predicted = {name: value.to(frames.device) for name, value in self.classifier(frames.float().to(device)).items()}
        probabilities, right, asked = torch.stack([torch.stack(judge(predicted, name, wanted[:, i])) for i, name in enumerate(ATTRIBUTES)], -1)
        number = asked.sum(-1)
        result = {
            "reward": torch.where(number > 0, (probabilities * asked).sum(-1) / number.clamp(min=1), torch.nan),
            "correct": torch.where(number > 0, (right >= asked).all(-1).float(), torch.nan),
        }
        masked = torch.where(asked > 0, probabilities, torch.nan)
        result |= {name: masked[:, i] for i, name in enumerate(ATTRIBUTES)}
        return {name: mean_over_frames(value, images) for name, value in result.items()}


class SceneJudgement(SceneScore):
    """The same questions answered by a network that took no part: another architecture, trained on other scenes.

    For the evaluation of what was trained on `scene_score`, or chosen by it: a gain there that is missing here is the classifier's error.

    Args:
        model: a folder of `SceneJudge`; the shipped one by default.
    """

    name = "scene_judge"

    @staticmethod
    def load(model: str | None) -> nn.Module:
        """The network that looks at the images."""
        from .. import embedded
        from ..embedded.scene_judge import SceneJudge

        return SceneJudge.from_pretrained(model or embedded.path("scene-judge"))


def wanted_classes(prompts: list[str]) -> Tensor:
    """(B, 4) the index of each attribute's class, -1 where the prompt names none."""
    from ..embedded.scenes import COLORS, COUNTS, OBJECTS, POSITIONS, parse

    classes = [list(names) for names in (OBJECTS, COUNTS, COLORS, POSITIONS)]
    rows = []
    for prompt in prompts:
        asked = parse(prompt)
        rows.append([names.index(asked[name]) if name in asked else -1 for name, names in zip(ATTRIBUTES, classes)])
    return torch.tensor(rows, dtype=torch.long).view(len(prompts), len(ATTRIBUTES))


def judge(predicted: dict[str, Tensor], attribute: str, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One attribute of N images, `wanted` (N,) as in `wanted_classes`: its probability, is it right, was it asked for; (N,) float each."""
    probabilities = position_probabilities(predicted["center"]) if attribute == "position" else predicted[attribute].softmax(-1)
    chosen = probabilities.gather(1, wanted.clamp(min=0)[:, None])[:, 0]
    right = chosen > 0.5 if attribute == "position" else probabilities.argmax(-1) == wanted
    return chosen, right.float(), (wanted >= 0).float()


def position_probabilities(center: Tensor) -> Tensor:
    """(N, 4) probabilities of left, right, top and bottom (each on its own) from the centres (N, 2)."""
    x, y = center.unbind(-1)
    margins = (THRESHOLD - x, x - (1 - THRESHOLD), THRESHOLD - y, y - (1 - THRESHOLD))
    return torch.sigmoid(torch.stack(margins, -1) / SHARPNESS)
