"""What scripts that learn from a data set share: its images as noised latents, the reference, and gradients in two passes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data import LazyImage, TensorCache, batch_of, key_of, load_preferences, parse_column_map
from ..data.augment import Augmentation, draw_augmentations, to_tensor
from ..forward_process import ForwardProcess
from ..policy import Policy, noise_seed
from ..rl.matching import error_coefficients, matching_error
from ..trajectory import Condition
from .averages import LaggingWeights


def load_rows(run, kind: str) -> list[dict]:
    """The data set's rows of that kind, after saying what was read and left out."""
    args = run.args
    columns = parse_column_map(args.column_map) if args.column_map else None
    options = {"split": args.dataset_split, "image_root": args.image_root, "column_map": columns, "ties": getattr(args, "ties", "drop")}
    return _loaded(run, args.dataset_name, kind, **options)


def load_captioned(run, source: str) -> list[dict]:
    """The rows of a second data set, of images with captions in columns of a known layout."""
    return _loaded(run, source, "captioned")


def _loaded(run, source: str, kind: str, **options) -> list[dict]:
    rows, report = load_preferences(source, kind, bad_rows=run.args.bad_rows, max_rows=run.args.max_rows, progress=run.is_main, **options)
    run.print(report)
    return rows


def load_policy(run, batches_in_turn: int = 1) -> Policy:
    """The run's policy, remembering the prompts of as many batches as are visited in turn: an epoch's are not met again."""
    policy = run.load_policy()
    policy.remember_prompts(2 * batches_in_turn + 2)
    return policy


@dataclass
class Position:
    """Where a row stands in training: everything random about it follows from `seed`."""

    row: int
    seed: int
    epoch: int


class Examples:
    """A data set as batches of noised latents, which depend on the position in training alone.

    Args:
        rows: of `load_rows`.
        stream: what tells its noise from that of another data set of the run.
        draw: another way than `batch_of` to choose rows, with the arguments (step, batch_size, seed, rank, world).

    Attributes:
        latents, noising: `LatentImages` and `Noising`, where their product `noised` is not what is wanted.
    """

    def __init__(self, run, policy: Policy, rows: list[dict], stream: str = "data", draw: Callable[..., list[int]] | None = None):
        self.run, self.policy, self.rows, self.stream, self.draw = run, policy, rows, stream, draw
        self.latents, self.noising = LatentImages(run, policy), Noising(run, policy)

    def positions(self, epoch: int, batch: int) -> list[Position]:
        """The rows that this process sees in a batch of an epoch."""
        args, rank, world = self.run.args, self.run.accelerator.process_index, self.run.accelerator.num_processes
        step, size = epoch * self.run.num_batches + batch, args.train_batch_size
        if self.draw is None:
            rows = batch_of(step, size, len(self.rows), args.seed, rank, world)
        else:
            rows = self.draw(step, size, args.seed, rank, world)
        first = (step * world + rank) * size
        return [Position(row, noise_seed(args.seed, self.stream, first + i), epoch) for i, row in enumerate(rows)]

    def condition(self, places: list[Position]) -> Condition:
        """The captions of the places, some of them emptied: whatever is noised there is seen under the same."""
        share = self.run.args.proportion_empty_prompts
        return self.policy.condition(["" if random.Random(place.seed).random() < share else self.rows[place.row]["prompt"] for place in places])

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


class LatentImages:
    """A data set's images as clean latents in the pipeline's own layout, from the cache where there is one."""

    def __init__(self, run, policy: Policy):
        self.args, self.policy = run.args, policy
        with torch.no_grad():
            sample = policy.rollout([""], seeds=[0], deterministic=True)
            self.shape = policy.decode(sample.final, sample.condition).shape[1:]
        dtype, name = next(iter(policy.denoisers.values())).dtype, self.args.pretrained_model_name_or_path
        model = f"latents/{name}/{self.args.revision}/{dtype}/{tuple(self.shape)}"
        self.cache = TensorCache(self.args.cache_dir, model) if self.args.cache_dir else None

    @torch.no_grad()
    def __call__(self, images: list[LazyImage], places: list[Position], condition: Condition) -> Tensor:
        """(B, *D). Images at equal places of training are cropped and mirrored alike. For a video, an image stands still."""
        changes = [self._augmentation(place) for place in places]

        def encode(index: list[int]) -> list[Tensor]:
            pixels = torch.stack([to_tensor(images[i].open(), *self.shape[-2:], changes[i]) for i in index])
            if len(self.shape) == 4:
                pixels = pixels[:, None].expand(-1, *self.shape).contiguous()
            return list(self.policy.encode(pixels.to(self.policy.device), condition.select(index)).cpu())

        if self.cache is None:
            latents = encode(list(range(len(images))))
        else:
            latents = self.cache.get_or_compute([key_of(image.content_hash(), change.key) for image, change in zip(images, changes)], encode)
        return torch.stack(latents).to(self.policy.device)

    def _augmentation(self, place: Position) -> Augmentation:
        options = {"random_crop": self.args.random_crop, "random_flip": self.args.random_flip}
        return draw_augmentations(1, seed=self.args.seed, epoch=place.epoch, row=place.row, **options)[0]


@dataclass
class Noised:
    """Latents x_t (B, *D) with noise at per-sample timesteps t (B,), under their captions.

    Attributes:
        target: what a perfect model would answer there, (B, *D).
        weight: (B,), of the squared error.
        reference: what the reference answers, (B, *D), without a graph; None where none was asked.
    """

    x_t: Tensor
    t: Tensor
    condition: Condition
    target: Tensor
    weight: Tensor
    reference: Tensor | None = None

    def error(self, output: Tensor) -> Tensor:
        """(B,) float32."""
        return self.weight * matching_error(output, self.target)

    def distance(self, output: Tensor) -> Tensor:
        """To the reference's answer, (B,) float32; 0 without a reference."""
        return torch.zeros_like(self.weight) if self.reference is None else self.weight * matching_error(output, self.reference)

    @property
    def ref_error(self) -> Tensor:
        """The reference's error, (B,); 0 without a reference."""
        return torch.zeros_like(self.weight) if self.reference is None else self.error(self.reference)

    def residual(self, output: Tensor) -> Tensor:
        """What the error's gradient by the output is proportional to, (B, *D)."""
        return self.weight.reshape(-1, *[1] * (output.ndim - 1)) * (output - self.target)


class Noising:
    """Noises latents; equal places get equal noise and timesteps, so a pair shares its own."""

    def __init__(self, run, policy: Policy):
        self.args, self.forward = run.args, ForwardProcess(policy.scheduler)
        self.scheme = run.args.timestep_scheme or ("logit_normal" if self.forward.is_flow else "uniform")

    def __call__(self, x0: Tensor, places: list[Position], condition: Condition) -> Noised:
        x_t, t, noise = next(self.forward.noised(x0, [place.seed for place in places], 1, scheme=self.scheme))
        return self.at(x0, x_t, t, noise, condition)

    def at(self, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor, condition: Condition) -> Noised:
        """The same for noise that is given."""
        weight = self.forward.error_weight(t, self.args.error_weighting).float().to(x0.device)
        return Noised(x_t, t, condition, self.forward.target(x0, noise, t).float(), weight)


class Reference:
    """What the model is measured against: the pretrained one, or an average that follows the model, as in Linear-DPO.

    Args:
        decay: of the average at each optimizer step; None for the pretrained model.
    """

    def __init__(self, run, policy: Policy, decay: float | None = None):
        self.run, self.policy, self.decay = run, policy, decay
        self.lagging = None if decay is None else LaggingWeights(policy.trainable_parameters())
        if self.lagging is not None:
            run.accelerator.register_for_checkpointing(self.lagging)

    @torch.no_grad()
    def __call__(self, *sides: Noised) -> None:
        """Give each of `sides` what the reference answers there, by the same forward pass as the model's own answer."""
        with self.lagging.applied() if self.lagging is not None else self.policy.reference():
            for side in sides:
                side.reference = predict(self.run, self.policy, side)

    def follow(self) -> None:
        """After each optimizer step."""
        if self.lagging is not None:
            self.lagging.update(self.decay)


@dataclass
class Measured:
    """Of the model's answer at a batch: its error (B,), its distance to the reference's (B,), and itself (B, *D), without a graph."""

    error: Tensor
    distance: Tensor
    output: Tensor

    def detach(self) -> Measured:
        return Measured(self.error.detach(), self.distance.detach(), self.output)


def predict(run, policy: Policy, side: Noised) -> Tensor:
    """The model's answer, (B, *D) float32."""
    with run.accelerator.autocast():
        return policy.predict(side.x_t, side.t, side.condition).float()


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
    return 1 / (len(batches) * run.args.train_batch_size * run.accelerator.num_processes)


def epoch_batches(run, num_batches: int, batches_a_step: int) -> Iterator[tuple[range, float]]:
    """The batches of each optimizer step, and their `sample_weight`."""
    for chunk in run.chunks(num_batches, batches_a_step):
        yield chunk, sample_weight(run, chunk)
