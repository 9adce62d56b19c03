"""A data set's images as noised latents: encoded once, noised by position in training alone, and the model's answer to them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...condition import Condition
from ...data import LazyImage, Prompt, TensorCache, key_of
from ...data.augment import Augmentation, draw_augmentations, to_tensor
from ...forward_process import ForwardProcess
from ...policy import Policy
from ...rl.matching import matching_error
from ..run.inputs import condition_of


@dataclass
class Position:
    """Where a row stands in training: everything random about it follows from `seed`."""

    row: int
    seed: int
    epoch: int


def as_they_are(args, accelerator) -> Namespace:
    """What `LatentImages`, `Noising` and `predict` want of a run, for measuring: no augmentation, timesteps uniform over the training range."""
    own = {"random_crop": False, "random_flip": False, "timestep_scheme": "uniform", "error_weighting": "native"}
    return Namespace(args=Namespace(**{"cache_dir": None, **vars(args), **own}), accelerator=accelerator)


def disk_cache(args, policy: Policy, *about: str) -> TensorCache | None:
    """The part of `--cache_dir` that holds one kind of tensor of this model; None without such a folder."""
    model = (args.pretrained_model_name_or_path, args.revision, args.variant, next(iter(policy.denoisers.values())).dtype)
    return TensorCache(args.cache_dir, "/".join(map(str, (*about, *model)))) if args.cache_dir else None


class LatentImages:
    """A data set's images as clean latents in the pipeline's own layout, from the cache where there is one.

    Args:
        like: what the pipeline is asked for to learn the size of its images.
    """

    def __init__(self, run, policy: Policy, like: Prompt | str = ""):
        self.args, self.policy = run.args, policy
        with torch.no_grad():
            sample = policy.rollout(condition_of(policy, [like], seeds=[0]), deterministic=True)
            self.shape = policy.decode(sample.final, sample.condition).shape[1:]
        self.cache = disk_cache(self.args, policy, "latents", str(tuple(self.shape)))

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
        return next(self.draws(x0, places, condition, 1))

    def draws(self, x0: Tensor, places: list[Position], condition: Condition, number: int) -> Iterator[Noised]:
        """`number` times, at timesteps in equal strata."""
        for x_t, t, noise in self.forward.noised(x0, [place.seed for place in places], number, scheme=self.scheme):
            yield self.at(x0, x_t, t, noise, condition)

    def at(self, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor, condition: Condition) -> Noised:
        """The same for noise that is given."""
        weight = self.forward.error_weight(t, self.args.error_weighting).float().to(x0.device)
        return Noised(x_t, t, condition, self.forward.target(x0, noise, t).float(), weight)


def predict(run, policy: Policy, side: Noised) -> Tensor:
    """The model's answer, (B, *D) float32."""
    with run.accelerator.autocast():
        return policy.predict(side.x_t, side.t, side.condition).float()
