"""What the stages of `train` share: scenes as tensors, the tokenizer, one training loop."""

from __future__ import annotations

import json
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, ModelMixin
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTokenizer

from .scenes import Scene, place, render, sample_scene

IMAGE_SIZE, LATENT_SIZE, MAX_TOKENS = 32, 16, 16


def make_scenes(number: int, seed: int, **shares) -> tuple[Tensor, list[Scene], Tensor]:
    """(N, 3, 32, 32) uint8 images, their scenes, and the objects' mean centres (N, 2) in [0, 1]. `shares` goes to `sample_scene`."""
    rng, images, scenes, centers = random.Random(seed), [], [], []
    for _ in range(number):
        scene = sample_scene(rng, **shares)
        boxes = place(scene, IMAGE_SIZE, rng)
        images.append(np.asarray(render(scene, rng, IMAGE_SIZE, boxes)))
        scenes.append(scene)
        centers.append(np.mean([((x + s / 2) / IMAGE_SIZE, (y + s / 2) / IMAGE_SIZE) for x, y, s in boxes], 0))
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return stacked, scenes, torch.tensor(np.stack(centers), dtype=torch.float32)


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose merges make one token of every word of the captions; other text falls back to letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    rng = random.Random(0)
    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<|startoftext|>", "<|endoftext|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=4000, special_tokens=special, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator((sample_scene(rng).caption() for _ in range(20000)), trainer)
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    # The trainer numbers letters in another order each time, the article "a" among them: letters are numbered anew.
    words = ["".join(pair) for pair in merges]
    letters = {*model["vocab"], *(letter + "</w>" for letter in alphabet)} - {*special, *words}
    vocab = {token: number for number, token in enumerate([*special, *sorted(letters), *words])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def text_config(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextConfig:
    """A small CLIP text transformer for the tokenizer's vocabulary."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS, projection_dim=width, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids (N, 16), padded as the pipelines pad them."""
    return tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt").input_ids


class Ema:
    """Exponential moving average of parameters, with the usual warm-up min(decay, (1 + n) / (10 + n))."""

    def __init__(self, parameters: list[nn.Parameter], decay: float = 0.999):
        self.parameters, self.decay, self.updates = parameters, decay, 0
        self.shadow = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.shadow, [p.detach() for p in self.parameters], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        for parameter, average in zip(self.parameters, self.shadow):
            held = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(held)


def fit(name: str, modules: list[nn.Module], loss_fn, save, minutes: float, lr: float, save_every: float = 300) -> None:
    """AdamW on `loss_fn()` for the given minutes: 100 warm-up updates, linear decay over the time left, saves of the EMA."""
    parameters = [p for module in modules for p in module.parameters()]
    optimizer, ema = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.99), weight_decay=0.01), Ema(parameters)
    print(f"{name}: {sum(p.numel() for p in parameters) / 1e6:.2f} M parameters, {minutes} minutes", flush=True)
    start, saved, average, update = time.monotonic(), 0.0, 0.0, 0
    while (elapsed := time.monotonic() - start) < 60 * minutes:
        rate = lr * min(1, (update + 1) / 100) * max(0.02, 1 - elapsed / (60 * minutes))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_fn()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        ema.update()
        average = loss.item() if update == 0 else 0.98 * average + 0.02 * loss.item()
        update += 1
        if update % 100 == 0:
            print(f"{name} update {update} after {elapsed:.0f} s: loss {average:.4f}", flush=True)
        if elapsed - saved > save_every:
            saved = elapsed
            ema.swap()
            save()
            ema.swap()
    ema.swap()
    save()


class NoisedScenes:
    """Scenes as latents (N, 4, 16, 16), noised at every level, for judges that serve both pipelines."""

    def __init__(self, out: Path, seed: int, number: int = 20000):
        vae, (images, self.scenes, _) = AutoencoderKL.from_pretrained(out / "vae").eval(), make_scenes(number, seed)
        with torch.no_grad():
            latents = torch.cat([vae.encode(part.float() / 127.5 - 1).latent_dist.mode() for part in images.split(256)])
        self.shift = vae.config.shift_factor * vae.config.scaling_factor
        self.latents = latents * vae.config.scaling_factor - self.shift

    def batch(self, size: int) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Numbers of scenes (B,), and their noised latents (B, 4, 16, 16) with alpha and sigma (B,)."""
        index = torch.randint(0, len(self.latents), (size,))
        # mini-sd's latents keep their mean, mini-sd3's do not.
        x0 = self.latents[index] + self.shift * torch.randint(0, 2, (size, 1, 1, 1))
        sigma = torch.sigmoid(1.3 * torch.randn(size) - 0.3)
        mix = sigma.view(-1, 1, 1, 1)
        return index, ((1 - mix) * x0 + mix * torch.randn_like(x0), 1 - sigma, sigma)


def contrast(logits: Tensor, caption_id: Tensor) -> Tensor:
    """CLIP's loss (https://arxiv.org/abs/2103.00020) of logits (B, B) of images and captions, without the pairs whose captions are equal."""
    same = (caption_id[:, None] == caption_id) & ~torch.eye(len(logits), dtype=torch.bool)
    logits, target = logits.masked_fill(same, -math.inf), torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def judged_images(out: Path, number: int, seed: int, **shares) -> tuple[Tensor, list[Scene], Tensor]:
    """Scenes as judges must know them: half sharp, half through the autoencoder with a little noise, as samples look. `shares` goes to `sample_scene`."""
    images, scenes, centers = make_scenes(number, seed, **shares)
    vae, half = AutoencoderKL.from_pretrained(out / "vae").eval(), number // 2
    with torch.no_grad():
        for start in range(0, half, 256):
            part = images[start : min(half, start + 256)]
            latents = vae.encode(part.float() / 127.5 - 1).latent_dist.mode()
            latents += 0.2 * torch.rand(len(part), 1, 1, 1) * torch.randn_like(latents) / vae.config.scaling_factor
            images[start : start + len(part)] = (vae.decode(latents).sample * 127.5 + 127.5).clamp(0, 255).byte()
    return images, scenes, centers


def save_pipeline(pipeline, folder: Path) -> None:
    """Denoiser and autoencoder in half precision; text encoders in float32, because transformers keeps a file's dtype."""
    pipeline.save_pretrained(folder)
    for file in folder.glob("text_encoder*/model.safetensors"):
        rename_for_every_version(file)
    for name in ("transformer", "unet", "vae"):
        if module := getattr(pipeline, name, None):
            save_half(module, folder / name)


def rename_for_every_version(file: Path) -> None:
    """A CLIP text model's weights under `text_model.`, where each version of transformers looks; a few write them without, and older
    ones then take random numbers."""
    state = load_file(file)
    if any(name.startswith("embeddings.") for name in state):
        save_file({f"text_model.{name}": value for name, value in state.items()}, file, metadata={"format": "pt"})


def save_half(module: ModelMixin, folder: Path) -> None:
    """A copy in half precision, whose config does not say from which folder the module came; the module goes on training in its own."""
    half = type(module).from_config({name: value for name, value in module.config.items() if not name.startswith("_")})
    half.load_state_dict(module.state_dict())
    half.half().save_pretrained(folder)
