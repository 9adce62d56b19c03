"""Pictures that tell how training goes: grids of samples, before and after, the reward curve."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] to a PIL image; of a video (F, 3, H, W) the middle frame."""
    if image.ndim == 4:
        image = image[len(image) // 2]
    return Image.fromarray(image.detach().float().clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).cpu().numpy())


def grid(images: list[Tensor], captions: list[str], columns: int = 8, cell: int = 128) -> Image.Image:
    """Images in rows, each above its caption."""
    label = 14
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * cell, rows * (cell + label)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images, captions)):
        x, y = (i % columns) * cell, (i // columns) * (cell + label)
        picture = to_pil(image)
        method = Image.Resampling.NEAREST if max(picture.size) < cell else Image.Resampling.LANCZOS
        sheet.paste(picture.resize((cell, cell), method), (x, y))
        draw.text((x + 2, y + cell + 1), _fitting(draw, caption, cell - 4), fill="black")
    return sheet


def before_and_after(before: list[Tensor], after: list[Tensor], captions: list[str], columns: int = 8, cell: int = 128) -> Image.Image:
    """Pairs of rows at equal prompts and seeds: the pretrained model above, the aligned one below."""
    return comparison({"before": before, "after": after}, captions, columns, cell)


def comparison(models: dict[str, list[Tensor]], captions: list[str], columns: int = 8, cell: int = 128) -> Image.Image:
    """A row a model, at equal prompts and seeds in each column; as many such blocks as the captions need."""
    images, labels = [], []
    for start in range(0, len(captions), columns):
        part = slice(start, start + columns)
        for name, samples in models.items():
            missing = columns - len(samples[part])
            images += [*samples[part], *[torch.ones_like(samples[0])] * missing]
            labels += [*(f"{name}: {caption}" for caption in captions[part]), *[""] * missing]
    return grid(images, labels, columns, cell)


def _fitting(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    while text and draw.textlength(text) > width:
        text = text[:-1]
    return text


def reward_curve(history: list[dict[str, float]], path: Path) -> None:
    """Mean reward an epoch with its spread between samples, or where there are no rollouts the accuracy on pairs or the loss; and the KL
    to the reference where logged."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    epochs = [row["epoch"] for row in history]
    with_kl = all("kl" in row for row in history)
    figure = Figure(figsize=(6, 5 if with_kl else 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2 if with_kl else 1, 1, sharex=True, squeeze=False)[:, 0]
    labels = {"reward": "reward of rollouts (mean, s.e.)", "accuracy": "accuracy on the epoch's pairs", "loss": "training loss"}
    name, label = next((name, label) for name, label in labels.items() if name in history[0])
    values, error = [row[name] for row in history], [row.get(f"{name}_se", 0.0) for row in history]
    axes[0].plot(epochs, values, color="tab:blue")
    axes[0].fill_between(epochs, [v - e for v, e in zip(values, error)], [v + e for v, e in zip(values, error)], alpha=0.25, color="tab:blue")
    axes[0].set_ylabel(label)
    if with_kl:
        axes[1].plot(epochs, [row["kl"] for row in history], color="tab:red")
        axes[1].set_ylabel("KL to the reference")
    axes[-1].set_xlabel("epoch")
    figure.savefig(path, dpi=110)
