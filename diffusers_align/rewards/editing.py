"""Is a picture the edit that was asked for? Two rewards that look at the source beside it; either alone is easy to hack, their sum less so.

`edit_direction`: does the picture change as the text does? The cosine, in CLIP's space, between the change from the source to the edited picture
and the change from the source's caption to the wanted one (StyleGAN-NADA, https://arxiv.org/abs/2108.00946; as a measure of editors:
InstructPix2Pix, https://arxiv.org/abs/2211.09800). Doing nothing scores 0.

`edit_preservation`: is all else as it was? Minus the mean absolute difference to the source, or the PSNR, outside a mask. Doing nothing scores best.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .clip_embedder import CLIPEmbedder
from .preprocessing import flatten_frames, mean_over_frames, repeat_for_frames

# Embeddings have norm 1. A change shorter than this counts in proportion: its direction is rounding, and its gradient would be endless.
SHORTEST_CHANGE = 1e-3
# Of the mean squared difference: a PSNR of 100 dB at most.
SMALLEST_ERROR = 1e-10


class EditDirection(nn.Module):
    """Cosine of the picture's and the text's change in CLIP's space, in [-1, 1]; of a video, the mean over frames. Differentiable.

    Args:
        model: a checkpoint of `transformers.CLIPModel`, by Hub name or folder, e.g. `diffusers_align.embedded.path("mini-clip")`.
        processor: where image settings and tokenizer are, if not with the model.
    """

    name = "edit_direction"

    def __init__(self, model: str = "openai/clip-vit-large-patch14", processor: str | None = None):
        super().__init__()
        self.clip = CLIPEmbedder(model, processor)
        self.eval()

    def forward(
        self, images: Tensor, prompts: list[str], *, image: list, source_prompt: list[str], target_prompt: list[str | None] | None = None, **columns: Any
    ) -> Tensor:
        """(B,) cosines of images (B, 3, H, W) or (B, F, 3, H, W) in [0, 1].

        Args:
            image: the source of each: a PIL picture, its path, a float tensor (3, H, W), or one of these for each frame.
            source_prompt: what the source shows.
            target_prompt: what the edited picture should show; absent or None: the prompt, which then is a caption and no instruction.

        Returns NaN where the two captions embed alike, or where a source is None.
        """
        wanted = [target or prompt for target, prompt in zip(target_prompt or [None] * len(prompts), prompts)]
        text = repeat_for_frames(self.clip.texts(wanted) - self.clip.texts(source_prompt), images)
        with torch.no_grad():
            before = self.clip.images(_sources(image, images))
        picture = self.clip.images(flatten_frames(images)) - before
        length = picture.norm(dim=-1).clamp_min(SHORTEST_CHANGE) * text.norm(dim=-1)
        cosine = torch.where(text.norm(dim=-1) > SHORTEST_CHANGE, (picture * text).sum(-1) / length, torch.nan)
        return mean_over_frames(cosine, images).to(images.device)


def edit_preservation(
    images: Tensor, prompts: list[str], *, image: list, mask: list | None = None, measure: Literal["l1", "psnr"] = "l1", **columns: Any
) -> Tensor:
    """How little changes outside the edited region: (B,), higher is better. Differentiable.

    Args:
        images: (B, 3, H, W) or (B, F, 3, H, W) in [0, 1].
        image: the source of each, as `EditDirection` takes it.
        mask: of each, in the same forms: white (1) where the picture may change, as in diffusers' inpainting; absent or None: nowhere.
        measure: "l1", minus the mean absolute difference, in [-1, 0]; or "psnr", in dB, 100 at most.

    Returns NaN where the mask leaves nothing, or where a source is None.

    Raises:
        ValueError: another measure.
    """
    if measure not in ("l1", "psnr"):
        raise ValueError(f"There is no measure {measure!r} of preservation: 'l1' and 'psnr' are.")
    frames = flatten_frames(images)
    masks = [None] * len(images) if mask is None else mask
    kept = 1 - _sources([torch.zeros_like(frames[0]) if entry is None else entry for entry in masks], images).mean(1, keepdim=True)
    weight = (kept / kept.mean((1, 2, 3), keepdim=True)).expand_as(frames)  # NaN where nothing is kept
    change = (frames - _sources(image, images)).abs()
    if measure == "l1":
        return -mean_over_frames((weight * change).mean((1, 2, 3)), images)
    error = (weight * change.square()).mean((1, 2, 3))
    return mean_over_frames(-10 * error.clamp_min(SMALLEST_ERROR).log10(), images)


def _sources(column: list, images: Tensor) -> Tensor:
    """What a column says of each frame of the images: (N, 3, H, W), NaN where it says None; one picture is all frames' of a video.

    Raises:
        ValueError: neither one picture nor one a frame.
    """
    frames = images.shape[1] if images.ndim == 5 else 1
    rows = []
    for entry in column:
        own = list(entry) if isinstance(entry, (list, tuple)) else [entry]
        if len(own) not in (1, frames):
            raise ValueError(f"A sample's source has {len(own)} pictures, and the sample {frames}: give one picture, or one for each frame.")
        rows += [_as_tensor(picture, images) for picture in own * (frames // len(own))]
    return torch.stack(rows)


def _as_tensor(picture: Any, images: Tensor) -> Tensor:
    """(3, H, W) of the images' size, as `--height` and `--width` bring it there: resized, aspect kept, the overhang cropped."""
    from ..data.augment import to_tensor
    from ..data.images import LazyImage

    height, width = images.shape[-2:]
    if picture is None:
        return torch.full_like(images.flatten(0, -4)[0], torch.nan)
    if isinstance(picture, (str, os.PathLike)):
        picture = _existing(Path(picture))
    if not isinstance(picture, Tensor):  # turned, laid on white and in sRGB, as the pipeline has had it
        return to_tensor(LazyImage(picture).open(), height, width).to(images)
    if picture.shape[-2:] != (height, width):
        raise ValueError(f"A source of {tuple(picture.shape)} beside images of {height} x {width}: tensors are not resized, PIL pictures are.")
    return picture.to(images).expand(3, height, width)


def _existing(path: Path) -> Path:
    """The file of a column that `--input_columns` does not name, and which therefore comes as text.

    Raises:
        ValueError: there is no such file.
    """
    if not path.is_file():
        raise ValueError(
            f"There is no picture {path}: a column that no flag names comes as it is written. --picture_columns opens those beside their file; in Python give "
            "pictures, or the path from the working directory."
        )
    return path
