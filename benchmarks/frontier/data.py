"""Prompts and preference data of a task, made once and kept: the model's own images judged by the reward, scenes with swapped objects, wrong labels."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.frontier import running
from benchmarks.frontier.tasks import CALL, FRESH, HARD, LIKES, PAIRS, SCORES, TASKS, Task, flags_of, fresh_prompts, write_lines
from diffusers_align.data import load_prompts
from diffusers_align.embedded.scenes import OBJECTS, place, render, sample_scene
from diffusers_align.embedded.teaching import IMAGE_SIZE

STEPS = 12  # of the samplings that make and judge images
IMAGES = 8  # of a prompt
BEST = 4  # of them, each against one of as many worst
LOOKS = 4  # images of a prompt by which it is called hard


@dataclass(frozen=True)
class Sizes:
    """How much data there is: prompts for the model's own images, and swapped pairs."""

    prompts: int = 500
    swaps: int = 2400


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Data:
    """What a task needs of one model, below a folder.

    Args:
        say: is told what is being made.
    """

    def __init__(self, folder: Path, task: str, model: str, sizes: Sizes, say):
        self.folder, self.name, self.task, self.model, self.sizes, self.say = folder / "data", task, TASKS[task], model, sizes, say

    # prompts

    def prompts(self, held_out: bool) -> str:
        """The training or the held-out prompts, as `--prompts` takes them."""
        source = self.task.held_out if held_out else self.task.train
        if source == FRESH:
            return str(self._fresh(held_out))
        return str(self._hard(held_out)) if source == HARD else source

    def _fresh(self, held_out: bool) -> Path:
        number = max(2, self.sizes.prompts // 2 if held_out else self.sizes.prompts)
        path = self.folder / "prompts" / f"fresh_{'held_out' if held_out else 'train'}_{number}.txt"
        if not path.is_file():
            known = {prompt.text for prompt in load_prompts("mini_heldout")}
            trained = set() if not held_out else set(load_texts(self._fresh(False)))
            write_lines(path, fresh_prompts(number, 1 + held_out, known | trained))
        return path

    def _hard(self, held_out: bool) -> Path:
        """Of fresh prompts, the third whose images fit worst, by the reward's mean over a few of them."""
        source = self._fresh(held_out)
        path = source.with_name(f"hard_{self.model}_{source.name}")
        if not path.is_file():
            folder = self._draw(str(source), self.task, LOOKS, self.folder / f"looks_{self.model}_{source.stem}", guidance=3.0)
            scores = defaultdict(list)
            for row in read_rows(folder / SCORES / "metadata.jsonl"):
                scores[row["prompt"]].append(row["reward"])
            worst = sorted(scores, key=lambda prompt: sum(scores[prompt]) / len(scores[prompt]))
            write_lines(path, worst[: max(2, len(worst) // 3)])
        return path

    # data sets

    def dataset(self, kind: str, wrong: float | None, apart: float = 0.0) -> Path:
        """The folder of a data set with this share of wrong labels, the task's own if None, and without the pairs of own images whose rewards are no more
        than `apart` from each other."""
        wrong = self.task.wrong if wrong is None else wrong
        source = self._swaps() if self.task.data == "swaps" else self._own()
        folder = source / f"{kind}_{BEST}_{wrong:g}{f'_{apart:g}' if apart else ''}"
        if not (folder / "metadata.jsonl").is_file():
            write_lines(folder / "metadata.jsonl", with_wrong_labels(self._rows(source, kind, apart), kind, wrong, random.Random(f"{kind} {wrong}")))
        return folder

    def _rows(self, source: Path, kind: str, apart: float) -> list[dict]:
        """With right labels. Of the model's own images there are all kinds; of swapped pairs, as scored images, the right ones."""
        if self.task.data == "swaps":
            pairs = read_rows(source / PAIRS / "metadata.jsonl")
            return pairs if kind == PAIRS else [{"prompt": row["prompt"], "image": row["image_0"], "reward": 1.0} for row in pairs]
        rows = read_rows(source / (LIKES if kind == LIKES else SCORES) / "metadata.jsonl")
        return best_and_worst(rows, apart=apart) if kind == PAIRS else rows

    def distinct(self, folder: Path) -> int:
        """How many different images a data set has."""
        names = ("image", "image_0", "image_1")
        return len({row[name] for row in read_rows(folder / "metadata.jsonl") for name in names if name in row})

    def _own(self) -> Path:
        prompts, guidance = self.prompts(False), self.task.data_guidance
        folder = self.folder / "_".join(["own", self.model, Path(prompts).stem, self.task.reward.replace("@", "_"), f"g{guidance:g}"])
        return self._draw(prompts, self.task, IMAGES, folder, guidance)

    def _draw(self, prompts: str, task: Task, number: int, folder: Path, guidance: float) -> Path:
        """`make_preferences.py`; a folder that is whole is used again."""
        if not (folder / "whole").is_file():
            self.say(f"drawing {folder.name}")
            flags = {"pretrained_model_name_or_path": self.model, "call_kwargs": CALL[self.model], "prompts": prompts, **flags_of(task.reward)}
            flags |= {"num_images_per_prompt": number, "num_inference_steps": STEPS, "guidance_scale": guidance, "batch_size": 48, "allow_no_signal": True}
            folder.mkdir(parents=True, exist_ok=True)
            running.run_script("make_preferences", flags | {"num_prompts": self.sizes.prompts, "output_dir": str(folder)}, folder)
            (folder / "whole").touch()
        return folder

    def _swaps(self) -> Path:
        """Pairs of real scenes: the same boxes, tilts and background, and the wrong object in the loser."""
        folder = self.folder / f"swaps_{self.sizes.swaps}"
        if not (folder / PAIRS / "metadata.jsonl").is_file():
            self.say(f"drawing {folder.name}")
            write_lines(folder / PAIRS / "metadata.jsonl", swapped_pairs(folder / "images", self.sizes.swaps))
        return folder


def load_texts(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def swapped_pairs(images: Path, number: int) -> list[dict]:
    """Draws the scenes of so many pairs; returns their rows."""
    images.mkdir(parents=True, exist_ok=True)
    rng, rows = random.Random(31), []
    known = {prompt.text for prompt in load_prompts("mini_heldout")}
    while len(rows) < number:
        scene = sample_scene(rng)
        if scene.caption() in known:
            continue
        boxes, seed = place(scene, IMAGE_SIZE, rng), rng.randrange(10**9)
        wrong = replace(scene, object=rng.choice([name for name in OBJECTS if name != scene.object]))
        names = [f"{len(rows):05d}_{side}.png" for side in "wl"]
        for name, shown in zip(names, (scene, wrong)):
            render(shown, random.Random(seed), IMAGE_SIZE, boxes).save(images / name)
        rows.append({"prompt": scene.caption(), "image_0": f"../images/{names[0]}", "image_1": f"../images/{names[1]}", "label_0": 1.0})
    return rows


def best_and_worst(rows: list[dict], number: int = BEST, apart: float = 0.0) -> list[dict]:
    """Of each prompt's scored images, the best against as many worst, the best with the worst first; rewards that are no more than
    `apart` from each other make no pair."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["prompt"]].append(row)
    pairs = []
    for group in groups.values():
        order = sorted(group, key=lambda row: -row["reward"])
        for better, worse in list(zip(order, reversed(order)))[: min(number, len(order) // 2)]:
            if better["reward"] > worse["reward"] + apart:
                others = {name: value for name, value in better.items() if name not in ("image", "reward")}
                pairs.append({**others, "image_0": better["image"], "image_1": worse["image"], "label_0": 1.0})
    return pairs


def with_wrong_labels(rows: list[dict], kind: str, share: float, rng: random.Random) -> list[dict]:
    """Rows of which this share, drawn at random, says the opposite; scores are exchanged among twice as many, so that 0.5 shuffles them all.

    Raises:
        ValueError: the share is not in [0, 0.5].
    """
    if not 0 <= share <= 0.5:
        raise ValueError(f"A share of wrong labels lies between 0 and 0.5, where labels are chance, got {share}.")
    rows = [dict(row) for row in rows]
    if kind == SCORES:
        chosen = rng.sample(range(len(rows)), round(2 * share * len(rows)))
        rewards = [rows[i]["reward"] for i in chosen]
        rng.shuffle(rewards)
        for i, reward in zip(chosen, rewards):
            rows[i]["reward"] = reward
        return rows
    for i in rng.sample(range(len(rows)), round(share * len(rows))):
        name = {PAIRS: "label_0", LIKES: "label"}[kind]
        rows[i][name] = (1.0 - rows[i][name]) if kind == PAIRS else (not rows[i][name])
    return rows
