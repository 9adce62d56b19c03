"""A data set's images as clean latents: encoded once, cropped and mirrored by their position in training alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils._pytree import tree_map

from ...condition import Condition, belongs_to_samples
from ...data import LazyImage, Prompt, TensorCache, inputs, key_of
from ...data.augment import Augmentation, draw_augmentations, to_tensor
from ...driving.encoder_state import encoder_digest
from ...driving.outcome import images_of
from ...driving.scheduler_hook import Step
from ...policy import Policy
from ..run.inputs import condition_of

# Bytes of encoded images, and as many of encoded prompts, that each process keeps in memory beside `--cache_dir`.
AT_HAND = 2**29


@dataclass
class Position:
    """Where a row stands in training: everything random about it follows from `seed`."""

    row: int
    seed: int
    epoch: int


def disk_cache(args, policy: Policy, *about: str) -> TensorCache | None:
    """The part of `--cache_dir` that holds one kind of tensor of this model, by its name and by the weights of what encodes: a folder may come to hold another
    model. None without such a folder."""
    if not args.cache_dir:
        return None
    model = (args.pretrained_model_name_or_path, args.revision, args.variant, next(iter(policy.denoisers.values())).dtype, encoder_digest(policy.pipeline))
    return TensorCache(args.cache_dir, "/".join(map(str, (*about, *model))), AT_HAND)


@torch.no_grad()
def image_shape(policy: Policy, condition: Condition) -> torch.Size:
    """Of what the pipeline's call makes, without the batch. Its loop runs with every step skipped: the denoiser is not called."""

    def skipped(step: Step) -> Tensor:
        step.skip()
        return step.sample

    return images_of(policy.drive(condition, skipped, needs_denoiser=lambda k: False, output_type="pt")).shape[1:]


class LatentImages:
    """A data set's images as clean latents in the pipeline's own layout, from the cache where there is one.

    Args:
        like: what the pipeline is asked for to learn the size of its images.

    Raises:
        ValueError: the pipeline makes sounds.
    """

    def __init__(self, run, policy: Policy, like: Prompt | str = ""):
        self.args, self.policy = run.args, policy
        self.shape = image_shape(policy, condition_of(policy, [like], seeds=[0]))
        if len(self.shape) == 2:
            name = type(policy.pipeline).__name__
            raise ValueError(f"{name} makes sounds, and data sets hold pictures: train it by a reward of sounds (docs/guides/sound.md).")
        tiled = ["tiled"] if getattr(self.args, "vae_tiling", False) else []  # encodes in tiles, too
        self.cache = disk_cache(self.args, policy, "latents", str(tuple(self.shape)), *tiled)

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
            own = [_held_by(condition, i) for i in range(len(images))]
            keys = [key_of(image.content_hash(), change.key, *beside) for image, change, beside in zip(images, changes, own)]
            latents = self.cache.get_or_compute(keys, encode)
        return torch.stack(latents).to(self.policy.device)

    def _augmentation(self, place: Position) -> Augmentation:
        options = {"random_crop": self.args.random_crop, "random_flip": self.args.random_flip}
        return draw_augmentations(1, seed=self.args.seed, epoch=place.epoch, row=place.row, **options)[0]


def _held_by(condition: Condition, i: int) -> list[str]:
    """What the latents of a sample depend on beside its image, in a list: what the condition may hold in the place of it, such as a region that is kept.
    Empty where there is nothing of the kind."""
    own = {name: value[i] for name, value in condition.per_sample.items() if not belongs_to_samples(name)}
    return [content] if (content := inputs.key_of(tree_map(lambda x: LazyImage(x) if isinstance(x, Image) else x, own), content=True)) else []
