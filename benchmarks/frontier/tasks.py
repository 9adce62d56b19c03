"""What is asked of the methods: a reward, prompts to train on and to judge on, data, and a judge that takes no part."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from diffusers_align import embedded
from diffusers_align.embedded.scenes import sample_scene
from diffusers_align.rewards import load_reward

CALL = {"mini-sd3": {"max_sequence_length": 1}, "mini-sd": {}}
# The noise that the path KL is measured with: that of the recipes.
KL_NOISE = {"mini-sd3": {"sde_type": "flow_grpo", "noise_level": 0.7}, "mini-sd": {"eta": 1.0}}
PAIRS, LIKES, SCORES = "pairs", "binary", "scored"
FRESH, HARD = "fresh", "hard"  # prompt sources that are made here, beside the sets of the package


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        reward: what is trained on, as NAME or NAME@MODEL.
        judge: as the reward, and never trained on; `--judge` puts another one in its place.
        part: the component of the reward that results are given in; the reward itself if empty.
        train, held_out: sets of the package, or `FRESH` or `HARD`.
        kinds: of data that are made for it.
        online: whether methods that sample for themselves, or take the reward's gradient, have this task.
        data: where the data come from: the model's own images judged by the reward, or scenes with a swapped object.
        wrong: share of wrong labels in the data.
        data_guidance: that the data's images are drawn with.
    """

    says: str
    reward: str
    judge: str
    train: str
    held_out: str
    part: str = ""
    kinds: tuple[str, ...] = (PAIRS, LIKES, SCORES)
    online: bool = True
    data: str = "own"
    wrong: float = 0.0
    data_guidance: float = 3.0

    @property
    def measured(self) -> str:
        """The reward, or its part, by its name in the tables."""
        return self.reward.partition("@")[0] + (f", {self.part}" if self.part else "")


CLIP, SCENE = "clip_score@mini-clip", "scene_score"
TASKS = {
    "color": Task("blue backgrounds: easy, and easily hacked", "background_color", SCENE, "likes_blue_train", "likes_blue_heldout"),
    "objects": Task("scenes of prompts that the base gets wrong", SCENE, CLIP, HARD, HARD),
    "clip": Task("the cosine of caption and image, without guidance", CLIP, SCENE, "mini_train", "mini_heldout", data_guidance=1.0),
    "swaps": Task("pairs of scenes that differ in the object", SCENE, CLIP, "mini_train", "mini_heldout", "object", (PAIRS,), False, "swaps"),
    "on_policy": Task("best and worst of the model's own images", SCENE, CLIP, FRESH, "mini_heldout", "", (PAIRS,), False),
    "likes": Task("likes and pairs of which one in ten is wrong", SCENE, CLIP, FRESH, "mini_heldout", "", (LIKES, PAIRS), False, wrong=0.1),
}


def load_by_name(spec: str) -> Callable:
    """A reward by NAME or NAME@MODEL, where the model is an embedded one, a folder or a name of the Hub; `scene_score@FOLDER` is another classifier."""
    name, _, model = spec.partition("@")
    found = embedded.path(model) if model in embedded.NAMES else model
    return load_reward(name, **({"model": found} if found else {}))


def flags_of(spec: str, prefix: str = "") -> dict[str, str]:
    """The same as flags of a training script."""
    name, _, model = spec.partition("@")
    return {f"{prefix}reward": name, **({f"{prefix}reward_model": model} if model else {})}


def fresh_prompts(number: int, seed: int, without: set[str]) -> list[str]:
    """Captions of so many different scenes, none of which is in `without`."""
    rng, found = random.Random(seed), dict[str, None]()
    for _ in range(1000 * number):
        caption = sample_scene(rng).caption()
        if caption not in without:
            found[caption] = None
        if len(found) == number:
            return list(found)
    raise ValueError(f"There are only {len(found)} captions beside {len(without)} others: ask for fewer than {number}.")


def write_lines(path: Path, rows: list) -> None:
    """A file that is whole or not there: texts as lines, dicts as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")
    partial.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)
