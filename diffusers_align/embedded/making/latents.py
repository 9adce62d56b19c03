"""Scenes that are drawn and encoded once: a cache on the disk, in shards, that a killed run goes on with."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer

from ..teaching import build_tokenizer, make_scenes, tokenize

# Scenes of several objects and named sides are what a model learns last, so they are shown more often than judges see them.
SHARES = {"counts": (0.5, 0.25, 0.25), "sided": 0.5}
SHARD, FIRST_SEED = 20000, 1000


def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Latents (N, 4, 16, 16) of uint8 images (N, 3, 32, 32), of mean 0 and deviation 1."""
    with torch.no_grad():
        latents = torch.cat([vae.encode(part.float() / 127.5 - 1).latent_dist.mode() for part in images.split(250)])
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


def write_safely(tensors: dict[str, Tensor], file: Path) -> None:
    """A safetensors file that is there whole or not at all."""
    beside = file.with_suffix(".part")
    save_file(tensors, beside)
    os.replace(beside, file)


def draw_shard(vae: AutoencoderKL, tokenizer: CLIPTokenizer, seed: int, number: int) -> dict[str, Tensor]:
    """`latents` (N, 4, 16, 16) in half precision and token ids `ids` (N, 16) of fresh scenes."""
    images, scenes, _ = make_scenes(number, seed, **SHARES)
    ids = tokenize(tokenizer, [scene.caption() for scene in scenes])
    return {"latents": encode(vae, images).half(), "ids": ids.to(torch.int16)}


def own_tokenizer(model: Path, drawn: Path) -> CLIPTokenizer:
    """The tokenizer whose numbers scenes are captioned in: that of the `model` that is trained further, a new one without. It stays in `drawn`.

    Raises:
        ValueError: the scenes that are drawn have another tokenizer's numbers, by which the model would learn other words.
    """
    given = model if (model / "tokenizer").exists() else None
    if not (drawn / "tokenizer").exists():
        tokenizer = CLIPTokenizer.from_pretrained(given / "tokenizer") if given else build_tokenizer()
        tokenizer.save_pretrained(drawn / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(drawn / "tokenizer")
    if given and CLIPTokenizer.from_pretrained(given / "tokenizer").get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"The scenes in {drawn} have captions in another tokenizer's numbers than {given.name}'s, which would learn each word anew: "
            "train it in a folder of its own, or delete the scenes, which are then drawn again."
        )
    return tokenizer


class LatentScenes:
    """Scenes encoded once: latents of mean 0 and deviation 1, token ids with a tenth of the captions empty.

    out: the folder with the autoencoder in `vae`; shards lie in its `latents`, with the tokenizer of their captions, which pipelines that
    are trained on them must have. model: name of the pipeline in it that is trained further, if there is one. shards: how many times 20,000
    scenes.

    Raises:
        ValueError: the shards' captions have other numbers than the model's tokenizer gives them.
    """

    def __init__(self, out: Path, model: str, shards: int = 6, shard_size: int = SHARD):
        self.vae = AutoencoderKL.from_pretrained(out / "vae").eval()
        folder = out / "latents"
        self.tokenizer = tokenizer = own_tokenizer(out / model, folder)
        for seed in range(FIRST_SEED, FIRST_SEED + shards):
            if not (folder / f"{seed}.safetensors").exists():
                write_safely(draw_shard(self.vae, tokenizer, seed, shard_size), folder / f"{seed}.safetensors")
                print(f"latents: {shard_size} scenes of seed {seed} drawn and encoded", flush=True)
        drawn = [load_file(folder / f"{seed}.safetensors") for seed in range(FIRST_SEED, FIRST_SEED + shards)]
        self.latents, self.ids = (torch.cat([shard[name] for shard in drawn]) for name in ("latents", "ids"))
        self.empty = tokenize(tokenizer, [""])

    def batch(self, size: int, among: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latents (B, 4, 16, 16), float32, and token ids (B, 16), of the scenes whose numbers are `among`; of all without."""
        index = torch.randint(0, len(self.latents if among is None else among), (size,))
        index = index if among is None else among[index]
        return self.latents[index].float(), torch.where(torch.rand(size, 1) < 0.1, self.empty, self.ids[index].long())
