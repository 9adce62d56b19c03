"""What tells whether a picture is right: the classifier that rewards, the judge that is held out, and the noise-aware classifier."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..classifier import SceneClassifier
from ..noisy_classifier import CLASSES, NoisySceneClassifier
from ..scene_judge import SceneJudge
from ..scenes import COLORS, OBJECTS
from ..teaching import NoisedScenes, fit, judged_images, save_half
from .endless import Training, train_on
from .latents import SHARES

# No scene of one is in the other's half: the numbers seed what is drawn.
CLASSIFIER_SEED, JUDGE_SEED = 3, 30


def what_scenes_show(network: nn.Module, out: Path, number: int, seed: int, **shares):
    """A loss for `fit`: cross-entropy of object, colour and count, a smooth L1 of the centre, on `number` scenes of a seed and `shares`."""
    images, scenes, centers = judged_images(out, number, seed, **shares)
    labels = {
        "object": torch.tensor([list(OBJECTS).index(s.object) for s in scenes]),
        "color": torch.tensor([list(COLORS).index(s.color) for s in scenes]),
        "count": torch.tensor([s.count - 1 for s in scenes]),
    }

    def loss_fn() -> Tensor:
        index = torch.randint(0, len(images), (96,))
        predicted = network((images[index].float() / 255).contiguous(memory_format=torch.channels_last))
        loss = sum(F.cross_entropy(predicted[name], label[index], label_smoothing=0.02) for name, label in labels.items())
        return loss + 10 * F.smooth_l1_loss(predicted["center"], centers[index], beta=0.05)

    return loss_fn


def train_classifier(out: Path, minutes: float) -> None:
    """The network behind the reward `scene_score`."""
    classifier = SceneClassifier().to(memory_format=torch.channels_last)
    loss_fn = what_scenes_show(classifier, out, 16000, CLASSIFIER_SEED)
    fit("classifier", [classifier], loss_fn, lambda: classifier.save_pretrained(out / "scene-classifier"), minutes, lr=2e-3)


def train_judge(out: Path, minutes: float) -> None:
    """The network behind `scene_judge`: another architecture, seed and other scenes, so that a gain by it is not the classifier's error.

    One in the output folder is trained further. Half of its scenes have several objects, since it learns to count last."""
    torch.manual_seed(JUDGE_SEED)
    folder = out / "scene-judge"
    judge = SceneJudge.from_pretrained(folder).train() if folder.exists() else SceneJudge()
    loss_fn = what_scenes_show(judge, out, 16000, JUDGE_SEED, **SHARES)
    train_on("judge", Training([judge], rates=(0.02, 2e-3)), loss_fn, lambda: save_half(judge, folder), out, minutes, decay=True)


def train_noisy_classifier(out: Path, minutes: float) -> None:
    """Cross-entropy at every noise level, without label smoothing: its gradient is used as a score, so it must be calibrated."""
    data = NoisedScenes(out, seed=5)
    labels = {name: torch.tensor([classes.index(getattr(scene, name)) for scene in data.scenes]) for name, classes in CLASSES.items()}
    classifier = NoisySceneClassifier().to(memory_format=torch.channels_last)

    def loss_fn() -> Tensor:
        index, state = data.batch(96)
        logits = classifier(*state)
        return sum(F.cross_entropy(logits[name], labels[name][index]) for name in CLASSES)

    fit("noisy classifier", [classifier], loss_fn, lambda: save_half(classifier, out / "noisy-classifier"), minutes, lr=2e-3)
