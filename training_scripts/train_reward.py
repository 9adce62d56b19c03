"""Learn a reward from preferences: a head on a frozen CLIP model, from pairs, likes and dislikes, or scores.

    python training_scripts/train_reward.py --dataset_name my_preferences/pairs --kind pair --model mini-clip --output_dir rewards/mine

The folder is a reward's name: `--reward rewards/mine`. Pairs are fitted by the Bradley-Terry model, ties as labels of one half; likes by logistic
regression; scores by least squares. The images are embedded once, so an epoch takes a moment. What is reported and kept in
`learned_reward.json` is of prompts that were held out.
"""

import argparse
import random
from collections import defaultdict

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

from diffusers_align.data import load_preferences, parse_column_map
from diffusers_align.data.augment import to_tensor
from diffusers_align.rewards.learned import features, load_clip, make_head, save
from diffusers_align.rl.preferences import pair_loss
from diffusers_align.training import arguments

IMAGES = {"pair": ("image_0", "image_1"), "binary": ("image",), "scored": ("image",)}
TARGET = {"pair": "label_0", "binary": "label", "scored": "reward"}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    parser.add_argument("--config", help="YAML recipe: its values replace the defaults, flags on the command line replace its values")
    parser.add_argument("--dataset_name", help="a .jsonl, .csv or .parquet file, a folder, or a set of the Hub")
    parser.add_argument("--dataset_split", default="train")
    parser.add_argument("--kind", choices=list(IMAGES), default="pair", help="what to learn from")
    parser.add_argument("--column_map", help="its columns, where they have other names: prompt=caption,image_0=left")
    parser.add_argument("--image_root", help="folder of relative image paths; the file's own if absent")
    parser.add_argument("--ties", choices=["drop", "soft"], default="soft", help="pairs without a winner: labels of one half, or left out")
    parser.add_argument("--bad_rows", choices=["skip", "error"], default="skip", help="broken rows: report and leave out, or stop")
    parser.add_argument("--held_out", type=float, default=0.2, help="share of the prompts that is not trained on")
    parser.add_argument("--model", default="openai/clip-vit-large-patch14", help="a CLIP model: Hub name, folder, or mini-clip")
    parser.add_argument("--hidden", type=int, default=0, help="units of the head's hidden layer; 0 is a linear head")
    parser.add_argument("--num_epochs", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--weight_decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output_dir", help="the reward: learned_reward.json and head.safetensors")
    args = arguments.parse_with_recipe(parser, argv, ("dataset_name", "output_dir"))
    for name in ("num_epochs", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if not 0 < args.held_out < 1:
        parser.error(f"--held_out is a share of the prompts, above 0 and below 1, got {args.held_out}")
    if args.hidden < 0 or args.learning_rate <= 0:
        parser.error(f"--hidden must not be negative and --learning_rate positive, got {args.hidden} and {args.learning_rate}")
    return args


@torch.no_grad()
def embed(clip, rows, names, batch_size):
    """Features (N, images a row, 3 D) of the rows' images under their prompts; each image is read once."""
    jobs = [(row["prompt"], row[name]) for row in rows for name in names]
    unique = {(prompt, image.identity): image for prompt, image in jobs}
    keys, found = list(unique), {}
    for start in tqdm(range(0, len(keys), batch_size), desc="embedding", unit="batch"):
        sizes = defaultdict(list)  # images of other sizes are no batch; they are not resized but by the model's own preprocessing
        for key in keys[start : start + batch_size]:
            image = unique[key].open()
            sizes[image.size].append((key, to_tensor(image, image.height, image.width)))
        for members in sizes.values():
            part = [key for key, _ in members]
            values = features(clip.images(torch.stack([pixels for _, pixels in members])), clip.texts([prompt for prompt, _ in part]))
            found |= zip(part, values.cpu())
    return torch.stack([found[prompt, image.identity] for prompt, image in jobs]).unflatten(0, (len(rows), len(names)))


def split(rows, share, seed):
    """Indices to train on and held out: no prompt is in both.

    Raises:
        ValueError: fewer than two prompts.
    """
    prompts = sorted({row["prompt"] for row in rows})
    if len(prompts) < 2:
        raise ValueError(f"The data has {len(prompts)} prompts: one to train on and one to hold out are needed at least.")
    number = min(len(prompts) - 1, max(1, round(share * len(prompts))))
    out = set(random.Random(f"{seed}/held-out").sample(prompts, number))
    parts = ([i for i, row in enumerate(rows) if (row["prompt"] in out) == held] for held in (False, True))
    return [torch.tensor(part) for part in parts]


def losses(kind, outputs, targets):
    """(B,) of the head's outputs (B, images a row)."""
    if kind == "pair":
        return pair_loss(outputs[:, 0] - outputs[:, 1], label=targets)
    if kind == "binary":
        return F.binary_cross_entropy_with_logits(outputs[:, 0], targets, reduction="none")
    return (outputs[:, 0] - targets).square()


def fit(args, head, inputs, targets, weights):
    """AdamW on minibatches in an order that the seed gives."""
    optimizer = torch.optim.AdamW(head.parameters(), args.learning_rate, weight_decay=args.weight_decay)
    order = torch.Generator().manual_seed(args.seed)
    head.train()
    for _ in (bar := tqdm(range(args.num_epochs), desc="fitting", unit="epoch")):
        for part in torch.randperm(len(inputs), generator=order).split(args.batch_size):
            values = losses(args.kind, head(inputs[part]).squeeze(-1), targets[part])
            loss = (values * weights[part]).sum() / weights[part].sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.4f}")
    head.eval()


def calibration_error(probabilities, labels, bins=10):
    """Expected calibration error of probabilities (N,) of labels (N,) in [0, 1]: the mean distance of the two over equal bins."""
    place = (probabilities * bins).long().clamp(max=bins - 1)
    gaps = [(probabilities[place == b] - labels[place == b]).sum().abs() for b in range(bins)]
    return float(torch.stack(gaps).sum() / len(labels))


@torch.no_grad()
def judge(kind, head, inputs, targets):
    """What the head is worth on rows that it has not seen."""
    outputs = head(inputs).squeeze(-1)
    metrics = {"loss": losses(kind, outputs, targets).mean().item(), "rows": len(targets)}
    if kind == "scored":
        # 1 - MSE / variance: the share of the scores' variance that is explained
        return metrics | {"r2": 1 - metrics["loss"] / targets.var(correction=0).clamp(min=1e-12).item()}
    logits = outputs[:, 0] - outputs[:, 1] if kind == "pair" else outputs[:, 0]
    decided = targets != 0.5
    correct = ((logits > 0) == (targets > 0.5))[decided].float()
    if kind == "pair":  # which image comes first means nothing: count each pair both ways
        logits, targets = torch.cat([logits, -logits]), torch.cat([targets, 1 - targets])
    return metrics | {"accuracy": correct.mean().item(), "calibration_error": calibration_error(torch.sigmoid(logits), targets)}


def main(argv=None):
    args = parse_args(argv)
    arguments.check_output_dir(args.output_dir)
    torch.manual_seed(args.seed)

    # 1 preferences as embeddings
    rows, report = load_preferences(
        args.dataset_name, args.kind, column_map=parse_column_map(args.column_map) if args.column_map else None, ties=args.ties,
        bad_rows=args.bad_rows, split=args.dataset_split, image_root=args.image_root,
    )  # fmt: skip
    print(report)
    train, held_out = split(rows, args.held_out, args.seed)
    clip = load_clip(args.model).to("cuda" if torch.cuda.is_available() else "cpu")
    inputs = embed(clip, rows, IMAGES[args.kind], args.batch_size)
    targets = torch.tensor([float(row[TARGET[args.kind]]) for row in rows])
    weights = torch.tensor([float(row.get("weight", 1.0)) for row in rows])
    scale, shift = (targets[train].std().clamp(min=1e-6).item(), targets[train].mean().item()) if args.kind == "scored" else (1.0, 0.0)
    targets = (targets - shift) / scale

    # 2 fit
    head = make_head(inputs.shape[-1] // 3, args.hidden)
    fit(args, head, inputs[train], targets[train], weights[train])

    # 3 judge and save
    metrics = {name: judge(args.kind, head, inputs[part], targets[part]) for name, part in (("train", train), ("held_out", held_out))}
    save(args.output_dir, head, args.model, args.hidden, scale, shift, kind=args.kind, data=args.dataset_name, metrics=metrics)
    for name, values in metrics.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in values.items()))
    print(f"Use it as --reward {args.output_dir}")


if __name__ == "__main__":
    main()
