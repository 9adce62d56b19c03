"""What scripts that learn from a data set share: its rows as batches, the reference, and gradients in two passes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...condition import Condition
from ...data import LazyImage, Prompt, batch_of, load_preferences, parse_column_map
from ...data.conversions import indifferent
from ...policy import Policy, noise_seed
from ...rl.matching import error_coefficients
from ..run.inputs import check_one_size, condition_of, inputs_of, prompt_of, prompts_of_rows
from ..run.weight_copies import LaggingWeights
from .data_latents import LatentImages, Noised, Noising, Position, disk_cache, predict


def load_rows(run, kind: str) -> list[dict]:
    """The data set's rows of that kind, after saying what was read and left out."""
    args, pairs = run.args, {}
    if kind == "pair":
        pairs = {"ties": args.ties, "weighting": args.pair_weighting}
    rows = _loaded(run, args.dataset_name, kind, split=args.dataset_split, **reading_options(args), **pairs)
    # likes alone are something to learn from, where the script takes them
    if kind != "binary" and (reason := indifferent(rows, kind)) and not getattr(args, "allow_no_signal", False):
        raise ValueError(f"{args.dataset_name}: {reason}, so there is nothing to learn. Give other data, or pass --allow_no_signal.")
    check_one_size(prompts_of_rows(rows), args.dataset_name)
    return rows


def reading_options(args) -> dict[str, Any]:
    """How the flags have a data set's rows read: arguments of `load_preferences`, for the held-out pairs as for the others."""
    columns = parse_column_map(args.column_map) if args.column_map else None
    return {"column_map": columns, "image_root": args.image_root, "bad_rows": args.bad_rows, "verify": args.verify, "inputs": inputs_of(args)}


def load_captioned(run, source: str) -> list[dict]:
    """The rows of a second data set, of images with captions in columns of a known layout."""
    return _loaded(run, source, "captioned", bad_rows=run.args.bad_rows, verify=run.args.verify, inputs=inputs_of(run.args))


def _loaded(run, source: str, kind: str, **options) -> list[dict]:
    rows, report = load_preferences(source, kind, max_rows=run.args.max_rows, progress=run.is_main, **options)
    run.print(report)
    return rows


def load_policy(run, batches_in_turn: int = 1) -> Policy:
    """The run's policy, remembering the prompts of as many batches as are visited in turn, and with `--cache_dir` every prompt's on disk."""
    policy = run.load_policy()
    policy.remember_prompts(2 * batches_in_turn + 2, disk_cache(run.args, policy, "prompts"))
    return policy


class Examples:
    """A data set as batches of noised latents, which depend on the position in training alone.

    Args:
        rows: of `load_rows`.
        stream: what tells its noise from that of another data set of the run.
        draw: another way than `batch_of` to choose rows, with the arguments (step, batch_size, seed).

    Attributes:
        latents, noising: `LatentImages` and `Noising`, where their product `noised` is not what is wanted.
    """

    def __init__(self, run, policy: Policy, rows: list[dict], stream: str = "data", draw: Callable[..., list[int]] | None = None):
        self.run, self.policy, self.rows, self.stream, self.draw = run, policy, rows, stream, draw
        self.latents, self.noising = LatentImages(run, policy, prompt_of(rows[0], "")), Noising(run, policy)

    def positions(self, epoch: int, batch: int) -> list[Position]:
        """The rows that this process sees in a batch of an epoch."""
        return self.at(epoch, self.run.division.batches[batch])

    def at(self, epoch: int, numbers: range) -> list[Position]:
        """The rows at these positions of an epoch's samples (`Division`), the same on every process."""
        seed, first = self.run.args.seed, epoch * self.run.division.num_samples
        draw = self.draw or (lambda place, size, seed: batch_of(place, size, len(self.rows), seed))
        return [Position(draw(first + i, 1, seed)[0], noise_seed(seed, self.stream, first + i), epoch) for i in numbers]

    def captions(self, places: list[Position]) -> list[str]:
        """The captions of the places, some of them emptied: whatever is noised there is seen under the same."""
        return [prompt.text for prompt in self._asked(places)]

    def condition(self, places: list[Position]) -> Condition:
        """The pipeline's call with the places' `captions`, and what else belongs to their rows. Seeds fix what the pipeline itself draws (of a
        picture that it encodes, say): model and reference see the same."""
        return condition_of(self.policy, self._asked(places), seeds=[place.seed for place in places])

    def _asked(self, places: list[Position]) -> list[Prompt]:
        share = self.run.args.proportion_empty_prompts
        emptied = [random.Random(place.seed).random() < share for place in places]
        return [prompt_of(self.rows[place.row], "" if empty else None) for place, empty in zip(places, emptied)]

    def noised(self, images: list[LazyImage], places: list[Position], condition: Condition) -> Noised:
        return self.noising(self.latents(images, places, condition), places, condition)

    def batch(self, epoch: int, batch: int) -> tuple[list[int], Noised]:
        """The rows' numbers and their images with noise, for data sets of one image a row."""
        places = self.positions(epoch, batch)
        index = [place.row for place in places]
        return index, self.noised([self.rows[i]["image"] for i in index], places, self.condition(places))


def pairs_of(rows: list[dict], places: list[Position], device: torch.device) -> tuple[list[tuple[LazyImage, ...]], Tensor, Tensor]:
    """Of rows of kind `pair`: winners and losers; the probability that the winner is the better one, (B,); the weights, (B,)."""
    chosen = [rows[place.row] for place in places]
    images = [(row["image_0"], row["image_1"]) if row["label_0"] >= 0.5 else (row["image_1"], row["image_0"]) for row in chosen]
    labels = [max(row["label_0"], 1 - row["label_0"]) for row in chosen]
    numbers = torch.tensor([labels, [row["weight"] for row in chosen]], device=device)
    return list(zip(*images)), numbers[0], numbers[1]


class Reference:
    """What the model is measured against: the pretrained one, or an average that follows the model, as in Linear-DPO.

    Args:
        decay: of the average at each optimizer step; None for the pretrained model.
    """

    def __init__(self, run, policy: Policy, decay: float | None = None):
        self.run, self.policy, self.decay = run, policy, decay
        self.lagging = None if decay is None else LaggingWeights(policy.trainable_parameters())
        if self.lagging is not None:
            run.register("moving_reference", self.lagging)

    @torch.no_grad()
    def __call__(self, *sides: Noised) -> None:
        """Give each of `sides` what the reference answers there, by the same forward pass as the model's own answer."""
        with self.lagging.applied() if self.lagging is not None else self.policy.reference():
            for side in sides:
                side.reference = predict(self.run, self.policy, side)

    def follow(self) -> None:
        """After each optimizer step; one that a loss scaler skipped is none."""
        if self.lagging is not None and not self.run.step_skipped:
            self.lagging.update(self.decay)


@dataclass
class Measured:
    """Of the model's answer at a batch: its error (B,), its distance to the reference's (B,), and itself (B, *D), without a graph."""

    error: Tensor
    distance: Tensor
    output: Tensor

    def detach(self) -> Measured:
        return Measured(self.error.detach(), self.distance.detach(), self.output)


def measure(run, policy: Policy, side: Noised) -> Measured:
    """The model's answer and its errors (B,), with their graph where autograd is on."""
    output = predict(run, policy, side)
    return Measured(side.error(output), side.distance(output), output.detach())


def descend(run, policy: Policy, loss: Callable[..., Tensor], sides: list[Noised], weight: float, two_pass: bool = False) -> tuple[Tensor, list[Measured]]:
    """Add the gradient of `weight` * sum(loss) to the parameters'.

    Args:
        loss: a function of each side's `Measured` to (B,). It may be differentiated by errors and distances.
        two_pass: measure without a graph, then have the gradient side by side from the loss's derivatives: the same numbers, with the
            activations of one side in memory, for one more forward pass a side.

    Returns:
        The loss (B,) and what was measured at each side, without graphs.
    """
    if not two_pass:
        found = [measure(run, policy, side) for side in sides]
        value = loss(*found)
        run.accelerator.backward(value.sum() * weight)
        return value.detach(), [m.detach() for m in found]
    with torch.no_grad():
        found = [measure(run, policy, side) for side in sides]

    def of(*numbers: Tensor) -> Tensor:
        return loss(*(Measured(error, distance, m.output) for error, distance, m in zip(numbers[::2], numbers[1::2], found)))

    value, coefficients = error_coefficients(of, *(number for m in found for number in (m.error, m.distance)))
    for side, by_error, by_distance in zip(sides, coefficients[::2], coefficients[1::2]):
        again = measure(run, policy, side)
        run.accelerator.backward((by_error * again.error + by_distance * again.distance).sum() * weight * len(value))
    return value, found


def sample_weight(run, batches: range) -> float:
    """What makes the sum over the samples of an optimizer step's batches, on all processes, their mean."""
    return 1 / (sum(len(run.division.batches[b]) for b in batches) * run.accelerator.num_processes)


def epoch_batches(run, num_batches: int, batches_a_step: int) -> Iterator[tuple[range, float]]:
    """The batches of each optimizer step, and their `sample_weight`."""
    for chunk in run.chunks(num_batches, batches_a_step):
        yield chunk, sample_weight(run, chunk)
