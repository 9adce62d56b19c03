"""What scripts that learn from a data set share: its flags, its images as latents, noised batches, and gradients in two passes."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data import LazyImage, TensorCache, batch_of, key_of, load_preferences, parse_column_map
from ..data.augment import draw_augmentations, to_tensor
from ..forward_process import WEIGHTINGS, ForwardProcess
from ..policy import Policy, noise_seed
from ..rl.matching import error_coefficients, matching_error
from ..trajectory import Condition

REQUIRED = ("pretrained_model_name_or_path", "dataset_name", "output_dir")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the data set and of how its images are noised."""
    flag = argparse.BooleanOptionalAction
    group = parser.add_argument_group("data")
    group.add_argument("--dataset_name", help="a .jsonl, .csv or .parquet file, a folder, or a set of the Hub")
    group.add_argument("--dataset_split", default="train")
    group.add_argument("--column_map", help="its columns, where they have other names: prompt=caption,image_0=left")
    group.add_argument("--image_root", help="folder of relative image paths; the file's own if absent")
    group.add_argument("--ties", choices=["drop", "soft", "keep"], default="drop", help="pairs without a winner")
    group.add_argument("--bad_rows", choices=["skip", "error"], default="skip", help="broken rows: report and leave out, or stop")
    group.add_argument("--max_rows", type=int, help="read the first so many rows only")
    group.add_argument("--num_samples_per_epoch", type=int, default=1024, help="rows an epoch: the stretch between two lines of the log")
    group.add_argument("--random_crop", action=flag, default=False, help="crop at random, both images of a pair alike; centred otherwise")
    group.add_argument("--random_flip", action=flag, default=False, help="mirror at random, both images of a pair alike")
    group.add_argument("--proportion_empty_prompts", type=float, default=0.1, help="share of prompts that are emptied, which keeps guidance working")
    group.add_argument("--cache_dir", help="keep latents on disk here; encoded at every use if absent. Not with --random_crop")
    group.add_argument("--two_pass", action="store_true", help="errors first, then gradients side by side: the same update with half the memory")
    group = parser.add_argument_group("noise")
    group.add_argument("--timestep_scheme", choices=["uniform", "logit_normal"], help="logit_normal for flow matching, uniform for diffusion if absent")
    group.add_argument("--error_weighting", choices=WEIGHTINGS, default="native", help="errors in the model's own terms, or converted")


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with a message where flags of `add_data_arguments` make no sense."""
    if args.num_samples_per_epoch < 1:
        parser.error(f"--num_samples_per_epoch must be at least 1, got {args.num_samples_per_epoch}")
    if not 0 <= args.proportion_empty_prompts <= 1:
        parser.error(f"--proportion_empty_prompts must lie in [0, 1], got {args.proportion_empty_prompts}")
    if args.cache_dir and args.random_crop:
        parser.error("--cache_dir with --random_crop would keep every crop and use none twice: leave out one of them")


def load_rows(run, kind: str) -> list[dict]:
    """The data set's rows of that kind, after saying what was read and left out."""
    args = run.args
    rows, report = load_preferences(
        args.dataset_name, kind, column_map=parse_column_map(args.column_map) if args.column_map else None, ties=args.ties, bad_rows=args.bad_rows,
        split=args.dataset_split, max_rows=args.max_rows, image_root=args.image_root, progress=run.is_main,
    )  # fmt: skip
    run.print(report)
    return rows


@dataclass
class Position:
    """Where a row stands in training: everything random about it follows from `seed`."""

    row: int
    seed: int
    epoch: int


def positions(run, number: int, epoch: int, batch: int, num_batches: int, draw: Callable[..., list[int]] | None = None) -> list[Position]:
    """The rows that this process sees in a batch of an epoch: they depend on the position in training alone.

    Args:
        number: of rows in the data set.
        draw: another way than `batch_of` to choose rows, with its arguments (step, batch_size, seed, rank, world).
    """
    args, rank, world = run.args, run.accelerator.process_index, run.accelerator.num_processes
    step, size = epoch * num_batches + batch, args.train_batch_size
    rows = draw(step, size, args.seed, rank, world) if draw else batch_of(step, size, number, args.seed, rank, world)
    first = (step * world + rank) * size
    return [Position(row, noise_seed(args.seed, "data", first + i), epoch) for i, row in enumerate(rows)]


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

        everything = list(range(len(images)))
        if self.cache is None:
            latents = encode(everything)
        else:
            latents = self.cache.get_or_compute([key_of(image.content_hash(), change.key) for image, change in zip(images, changes)], encode)
        return torch.stack(latents).to(self.policy.device)

    def _augmentation(self, place: Position):
        options = {"random_crop": self.args.random_crop, "random_flip": self.args.random_flip}
        return draw_augmentations(1, seed=self.args.seed, epoch=place.epoch, row=place.row, **options)[0]


def captions(args, rows: list[dict], places: list[Position]) -> list[str]:
    """The prompts of the places, some of them emptied."""
    return ["" if random.Random(place.seed).random() < args.proportion_empty_prompts else rows[place.row]["prompt"] for place in places]


@dataclass
class Noised:
    """Clean latents with noise at per-sample timesteps, what a perfect model would answer there, and the error's weight (B,)."""

    x0: Tensor
    x_t: Tensor
    t: Tensor
    noise: Tensor
    target: Tensor
    weight: Tensor

    def error(self, output: Tensor) -> Tensor:
        """(B,) float32."""
        return self.weight * matching_error(output, self.target)

    def residual(self, output: Tensor) -> Tensor:
        """What the error's gradient by the output is proportional to, (B, *D)."""
        return self.weight.reshape(-1, *[1] * (output.ndim - 1)) * (output - self.target)


class Noising:
    """Noises latents; equal places get equal noise and timesteps, so a pair shares its own."""

    def __init__(self, run, policy: Policy):
        self.args, self.forward = run.args, ForwardProcess(policy.scheduler)
        self.scheme = run.args.timestep_scheme or ("logit_normal" if self.forward.is_flow else "uniform")

    def __call__(self, x0: Tensor, places: list[Position]) -> Noised:
        x_t, t, noise = next(self.forward.noised(x0, [place.seed for place in places], 1, scheme=self.scheme))
        return self.at(x0, x_t, t, noise)

    def at(self, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> Noised:
        """The same for noise that is given."""
        weight = self.forward.error_weight(t, self.args.error_weighting).float().to(x0.device)
        return Noised(x0, x_t, t, noise, self.forward.target(x0, noise, t).float(), weight)


def reference_outputs(run, policy: Policy, sides: list[Noised], condition: Condition) -> list[Tensor]:
    """The pretrained model's outputs at each of `sides`, without gradient."""
    with torch.no_grad(), policy.reference(), run.accelerator.autocast():
        return [policy.predict(side.x_t, side.t, condition).float() for side in sides]


def descend(
    run, loss: Callable[..., Tensor], outputs: Callable[[Noised], Tensor], sides: list[Noised], weight: float
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Add the gradient of `weight` * sum(loss) to the parameters'.

    Args:
        loss: of the errors (B,) and outputs (B, *D) of each side, `loss(errors, outputs)`, to (B,). It may not differentiate the outputs.
        outputs: the model's output at a side, with its graph.

    With `--two_pass` the errors are computed without a graph, and the gradient side by side from the loss's derivatives: the same
    numbers, with the activations of one side in memory.

    Returns:
        The loss (B,), errors and outputs of each side, without graphs.
    """
    if not run.args.two_pass:
        found = [outputs(side) for side in sides]
        errors = [side.error(output) for side, output in zip(sides, found)]
        value = loss(errors, [output.detach() for output in found])
        run.accelerator.backward(value.sum() * weight)
        return value.detach(), [e.detach() for e in errors], [o.detach() for o in found]
    with torch.no_grad():
        found = [outputs(side) for side in sides]
        errors = [side.error(output) for side, output in zip(sides, found)]
    value, coefficients = error_coefficients(lambda *leaves: loss(list(leaves), found), *errors)
    for side, coefficient in zip(sides, coefficients):
        run.accelerator.backward((coefficient * side.error(outputs(side))).sum() * weight * len(coefficient))
    return value, errors, found


def epoch_batches(run, num_batches: int, batches_a_step: int) -> Iterator[tuple[range, float]]:
    """The batches of each optimizer step, and what makes a sum over their samples, on all processes, their mean."""
    for chunk in run.chunks(num_batches, batches_a_step):
        yield chunk, 1 / (len(chunk) * run.args.train_batch_size * run.accelerator.num_processes)
