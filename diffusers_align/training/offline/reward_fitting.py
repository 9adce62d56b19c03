"""Fitting a reward to preferences of any kind: examples, what they ask of the reward's logits, and what the result is worth.

`train_reward.py` alone has it: what it trains is a head on CLIP, not a pipeline.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from ...data.augment import to_tensor
from ...policy import Policy, noise_seed
from ...rewards.learned import RewardModel
from ...rl.pair_losses import pair_loss, plackett_luce_loss
from ..report.statistics import wilson_interval
from ..run.health import Start
from .data_latents import LatentImages, Position
from .noised_latents import Noising, as_they_are, predict

TARGET = {"pair": "label_0", "binary": "label", "scored": "reward", "ranked": "ranks"}
NOISE_BINS = 4


@dataclass
class Picture:
    """An image to be judged: `read()` is (3, H, W) in [0, 1], and equal keys are equal images."""

    key: object
    read: Callable[[], Tensor]


@dataclass
class Example:
    """What is compared: images of a prompt, predictions from one noise level (0: finished images).

    Attributes:
        target: (K,) for K images; of kinds but `ranked` one number, for the first.
    """

    prompt: str
    pictures: list[Picture]
    target: Tensor
    weight: float = 1.0
    noise_level: float = 0.0


def images_of(row: dict, kind: str) -> list:
    """The row's images, lazily."""
    return row["images"] if kind == "ranked" else [row[name] for name in (("image_0", "image_1") if kind == "pair" else ("image",))]


def examples_of(rows: list[dict], kind: str) -> list[Example]:
    """The rows' own images."""

    def picture(image) -> Picture:
        return Picture(image.identity, lambda: (opened := image.open()) and to_tensor(opened, opened.height, opened.width))

    def target(row: dict) -> Tensor:
        return torch.tensor(row[TARGET[kind]], dtype=torch.float32).reshape(-1)

    return [Example(row["prompt"], [picture(image) for image in images_of(row, kind)], target(row), float(row.get("weight", 1.0))) for row in rows]


@torch.no_grad()
def noised_examples(args, accelerator, policy: Policy, rows: list[dict], kind: str, number: int) -> list[Example]:
    """The rows' images as a model sees them: noised, and the clean samples that one call of the denoiser predicts (without guidance).

    `number` times for each row, at timesteps in equal strata over the training range; images of a row share noise and timestep. Kept in
    memory in 8 bits. Of a video, the first frame: an image stands still in it.
    """
    run = as_they_are(args, accelerator)
    latents, noising = LatentImages(run, policy), Noising(run, policy)
    found = [[Example(e.prompt, [], e.target, e.weight) for e in examples_of(rows, kind)] for _ in range(number)]
    jobs = [(row, image) for row in range(len(rows)) for image in images_of(rows[row], kind)]
    for start in tqdm(range(0, len(jobs), args.train_batch_size), desc="denoising", unit="batch"):
        part = jobs[start : start + args.train_batch_size]
        places = [Position(row, noise_seed(args.seed, "reward", row), 0) for row, _ in part]
        condition = policy.condition([rows[row]["prompt"] for row, _ in part], seeds=[place.seed for place in places])
        x0 = latents([image for _, image in part], places, condition)
        for draw, side in enumerate(noising.draws(x0, places, condition, number)):
            clean = noising.forward.to_x0(predict(run, policy, side), side.x_t, side.t).to(x0.dtype)
            images = (policy.decode(clean, condition).float() * 255).round().byte().cpu()
            images = images[:, 0] if images.ndim == 5 else images
            for (row, _), image, level in zip(part, images, policy.scheduler.noise_weight(side.t).tolist()):
                example = found[draw][row]
                example.noise_level = level
                example.pictures.append(Picture((draw, row, len(example.pictures)), lambda image=image: image.float() / 255))
    return [example for draw in found for example in draw]


def split(rows: list[dict], share: float, seed: int) -> list[Tensor]:
    """Indices to train on and held out: no prompt is in both.

    Raises:
        ValueError: fewer than two prompts.
    """
    prompts = sorted({row["prompt"] for row in rows})
    if len(prompts) < 2:
        raise ValueError(f"The data has {len(prompts)} prompts: one to train on and one to hold out are needed at least.")
    number = min(len(prompts) - 1, max(1, round(share * len(prompts))))
    out = set(random.Random(f"{seed}/held-out").sample(prompts, number))
    parts = ([i for i, row in enumerate(rows) if (row["prompt"] in out) == held] for held in (False, True))
    return [torch.tensor(part) for part in parts]


class Logits:
    """The model's logits of examples, (B, K) with NaN where an example has fewer than K images.

    Embeddings of prompts are kept; those of images too, unless the model changes them while it learns.
    """

    def __init__(self, model: RewardModel, batch_size: int):
        self.model, self.batch_size, self.frozen = model, batch_size, model.settings["rank"] == 0
        self.texts: dict[str, Tensor] = {}
        self.images: dict[object, Tensor] = {}

    def embed(self, examples: list[Example]) -> None:
        """Whatever can be embedded once."""
        texts, pictures = list({e.prompt for e in examples}), list({p.key: p for e in examples for p in e.pictures}.values())
        for start in range(0, len(texts), self.batch_size):
            part = texts[start : start + self.batch_size]
            self.texts |= zip(part, self.model.clip.texts(part))
        for start in tqdm(range(0, len(pictures) if self.frozen else 0, self.batch_size), desc="embedding", unit="batch"):
            part = pictures[start : start + self.batch_size]
            with torch.no_grad():
                self.images |= zip((picture.key for picture in part), self._embedded(part))

    def _embedded(self, pictures: list[Picture]) -> list[Tensor]:
        """Images of other sizes are no batch; they are not resized but by the model's own preprocessing."""
        pixels, found = [picture.read() for picture in pictures], {}
        for size in {image.shape for image in pixels}:
            index = [i for i, image in enumerate(pixels) if image.shape == size]
            found |= zip(index, self.model.clip.images(torch.stack([pixels[i] for i in index])))
        return [found[i] for i in range(len(pixels))]

    def __call__(self, examples: list[Example]) -> Tensor:
        flat = [(example, picture) for example in examples for picture in example.pictures]
        images = [self.images[picture.key] for _, picture in flat] if self.frozen else self._embedded([picture for _, picture in flat])
        texts = torch.stack([self.texts[example.prompt] for example, _ in flat])
        levels = torch.tensor([example.noise_level for example, _ in flat], device=texts.device)
        logits = self.model(torch.stack(images), texts, levels).split([len(example.pictures) for example in examples])
        return torch.nn.utils.rnn.pad_sequence(list(logits), batch_first=True, padding_value=torch.nan)


def targets_of(examples: list[Example]) -> Tensor:
    """(B,), or (B, K) with NaN where examples have a number for each image."""
    targets = torch.nn.utils.rnn.pad_sequence([example.target for example in examples], batch_first=True, padding_value=torch.nan)
    return targets.squeeze(1)


def losses(kind: str, outputs: Tensor, targets: Tensor) -> Tensor:
    """(B,) of the logits (B, images per row)."""
    if kind == "pair":
        return pair_loss(outputs[:, 0] - outputs[:, 1], label=targets)
    if kind == "binary":
        return F.binary_cross_entropy_with_logits(outputs[:, 0], targets, reduction="none")
    return plackett_luce_loss(outputs, targets) if kind == "ranked" else (outputs[:, 0] - targets).square()


def check_signal(kind: str, targets: Tensor) -> None:
    """Find out before fitting that there is nothing to fit.

    Raises:
        ValueError: the targets prefer nothing: ties alone, one label, or one score.
    """
    known = ~targets.isnan()
    if kind == "ranked":
        equal = (targets.where(known, -torch.inf).amax(1) == targets.where(known, torch.inf).amin(1)).all()
    else:
        equal = (targets == 0.5).all() if kind == "pair" else (targets == targets[0]).all()
    if equal:
        what = {
            "pair": "all pairs are ties",
            "ranked": "all images of a prompt have one rank",
            "binary": "all labels are equal",
            "scored": "all scores are equal",
        }
        raise ValueError(
            f"There is nothing to learn from {len(targets)} examples of kind {kind}: {what[kind]}. Give data that prefers something, check "
            "--column_map, or pass --allow_no_signal."
        )


def fit(args, logits: Logits, examples: list[Example]) -> bool:
    """AdamW on minibatches in an order that the seed gives. Returns whether it has moved a weight.

    Raises:
        ValueError: the examples prefer nothing (unless `--allow_no_signal`), or the loss is no longer a finite number.
    """
    if not args.allow_no_signal:
        check_signal(args.kind, targets_of(examples))
    model, order = logits.model, torch.Generator().manual_seed(args.seed)
    parameters = [*model.head.parameters(), *(p for name, p in model.clip.named_parameters() if "lora_" in name)]
    optimizer = torch.optim.AdamW(parameters, args.learning_rate, weight_decay=args.adam_weight_decay)
    start = Start(parameters)
    start.mark()
    model.head.train()
    for _ in (bar := tqdm(range(args.num_epochs), desc="fitting", unit="epoch")):
        for index in torch.randperm(len(examples), generator=order).split(args.train_batch_size):
            part = [examples[i] for i in index]
            outputs = logits(part)
            weights = torch.tensor([example.weight for example in part], device=outputs.device)
            loss = (losses(args.kind, outputs, targets_of(part).to(outputs.device)) * weights).sum() / weights.sum()
            if not loss.isfinite():
                raise ValueError(f"The loss of the fit has become {loss.item()}. Nothing was saved. Lower --learning_rate {args.learning_rate:g}.")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.4f}")
    model.head.eval()
    return start.moved()


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 10) -> float:
    """Expected calibration error of probabilities (N,) of labels (N,) in [0, 1]: the mean distance of the two over equal bins."""
    place = (probabilities * bins).long().clamp(max=bins - 1)
    gaps = [(probabilities[place == b] - labels[place == b]).sum().abs() for b in range(bins)]
    return float(torch.stack(gaps).sum() / len(labels))


def comparisons(kind: str, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What was asked of the logits, as (N,) logits, (N,) labels of them, and the row (N,) that each is from; of rankings, all pairs."""
    rows = torch.arange(len(outputs))
    if kind == "pair":
        return outputs[:, 0] - outputs[:, 1], targets, rows
    if kind == "binary":
        return outputs[:, 0], targets, rows
    first, second = torch.triu_indices(outputs.shape[1], outputs.shape[1], 1)
    gap, there = targets[:, second] - targets[:, first], ~(targets[:, first] + targets[:, second]).isnan()  # rank 1 is the best
    return (outputs[:, first] - outputs[:, second])[there], 0.5 * (gap[there].sign() + 1), rows[:, None].expand_as(there)[there]


@torch.no_grad()
def judge(kind: str, logits: Logits, examples: list[Example]) -> dict:
    """What the reward is worth on examples: loss, accuracy where there is a preference, calibration; the same by noise level where there are several."""
    parts = [examples[start : start + logits.batch_size] for start in range(0, len(examples), logits.batch_size)]
    # Batches may differ in their widest example: pad them alike.
    columns = [row for part in parts for row in logits(part).cpu()]
    outputs, targets = torch.nn.utils.rnn.pad_sequence(columns, batch_first=True, padding_value=torch.nan), targets_of(examples)
    outputs = outputs[:, : max(len(example.pictures) for example in examples)]
    metrics = {"loss": losses(kind, outputs, targets).mean().item(), "rows": len(targets)}
    if kind == "scored":
        # 1 - MSE / variance: the share of the scores' variance that is explained
        return metrics | {"r2": 1 - metrics["loss"] / targets.var(correction=0).clamp(min=1e-12).item()}
    found, labels, rows = comparisons(kind, outputs, targets)
    metrics |= _worth(kind, found, labels)
    levels = torch.tensor([example.noise_level for example in examples])[rows]
    if levels.any():
        places = (levels * NOISE_BINS).ceil().long()  # 0 are finished images
        edges = ["0", *(f"{(b - 1) / NOISE_BINS:g} to {b / NOISE_BINS:g}" for b in range(1, NOISE_BINS + 1))]
        metrics["by_noise_level"] = {edges[b]: _worth(kind, found[places == b], labels[places == b]) for b in places.unique().tolist()}
    return metrics


def _worth(kind: str, logits: Tensor, labels: Tensor) -> dict[str, float]:
    decided = labels != 0.5
    right = ((logits > 0) == (labels > 0.5))[decided]
    accuracy = right.float().mean().item()
    low, high = wilson_interval(int(right.sum()), len(right))
    if kind != "binary":  # which image comes first means nothing: count each pair both ways
        logits, labels = torch.cat([logits, -logits]), torch.cat([labels, 1 - labels])
    return {
        "accuracy": accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "decided": len(right),
        "calibration_error": calibration_error(torch.sigmoid(logits), labels),
    }


def described(metrics: dict) -> str:
    """The numbers of `judge` in a line, an accuracy with its 95 % interval (Wilson's) and what it is a share of."""
    words = []
    for name, value in metrics.items():
        if name == "accuracy":
            words.append(f"accuracy {value:.4g} [{metrics['accuracy_low']:.2f}, {metrics['accuracy_high']:.2f}] of {metrics['decided']}")
        elif not name.startswith("accuracy_") and name != "decided":
            words.append(f"{name} {value:.4g}")
    return ", ".join(words)
