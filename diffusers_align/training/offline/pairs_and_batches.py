"""A data set as batches of noised latents: which rows, under which captions, with which noise."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

from ...condition import Condition
from ...data import LazyImage, Prompt, batch_of
from ...policy import Policy, noise_seed
from ..run.inputs import condition_of, prompt_of
from .data_latents import LatentImages, Position
from .noised_latents import Noised, Noising


class Examples:
    """A data set as batches of noised latents, which depend on the position in training alone.

    Args:
        rows: of `load_rows`.
        stream: what tells its noise from that of another data set of the run.
        draw: another way than `batch_of` to choose rows, with the arguments (step, batch_size, seed).
        noise: another way than `Noising` to noise latents, a function of these examples and the arguments of a `Noising`.

    Attributes:
        latents, noising: `LatentImages` and `Noising`, of which `noised` is made.
    """

    def __init__(
        self,
        run,
        policy: Policy,
        rows: list[dict],
        stream: str = "data",
        draw: Callable[..., list[int]] | None = None,
        noise: Callable[..., Noised] | None = None,
    ):
        self.run, self.policy, self.rows, self.stream, self.draw, self.noise = run, policy, rows, stream, draw, noise
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
        """One side of a pair, or all there is: the images as latents with noise."""
        x0 = self.latents(images, places, condition)
        return self.noise(self, x0, places, condition) if self.noise else self.noising(x0, places, condition)

    def pairs(self, epoch: int, batch: int) -> tuple[list[Noised], Tensor, Tensor]:
        """The winners and the losers with noise, which a pair shares as it does the caption; labels (B,) and weights (B,) as `pairs_of` has them."""
        places = self.positions(epoch, batch)
        condition, (images, labels, weights) = self.condition(places), pairs_of(self.rows, places, self.policy.device)
        return [self.noised(side, places, condition) for side in images], labels, weights

    def batch(self, epoch: int, batch: int) -> tuple[list[int], Noised]:
        """The rows' numbers and their images with noise, for data sets of one image per row."""
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
