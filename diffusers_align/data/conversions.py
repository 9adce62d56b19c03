"""Preference data of one kind as another: pure functions from rows to rows."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from itertools import combinations

import torch

from .inputs import key_of

TIE = 0.5


def apply_ties(pairs: Sequence[dict], policy: str) -> tuple[list[dict], int]:
    """What becomes of pairs whose `label_0` is 0.5, and how many there were. No policy counts a tie as a win.

    * `drop`: they are left out (Diffusion-DPO, https://arxiv.org/abs/2311.12908, section 5.1).
    * `soft`: they stay, for losses that take soft labels: loss = -[p log s(z) + (1 - p) log s(-z)].
    * `keep`: each becomes two pairs of opposite labels and half the weight, for losses without soft labels.
    """
    ties = [row for row in pairs if row["label_0"] == TIE]
    if policy == "soft":
        return list(pairs), len(ties)
    decided = [row for row in pairs if row["label_0"] != TIE]
    if policy == "keep":
        decided += [{**row, "label_0": label, "weight": row.get("weight", 1.0) / 2} for row in ties for label in (1.0, 0.0)]
    elif policy != "drop":
        raise ValueError(f"ties must be 'drop', 'soft' or 'keep', got {policy!r}.")
    return decided, len(ties)


def indifferent(rows: Sequence[dict], kind: str) -> str | None:
    """Why rows of a kind prefer nothing to anything, in words; None where they do."""
    if kind == "pair" and rows and not any(row.get("weight", 1.0) for row in rows):
        return "all pairs have the weight 0"
    if kind == "pair" and all(row["label_0"] == TIE for row in rows):
        return "all pairs are ties"
    if kind == "binary" and len({row["label"] for row in rows}) == 1:
        return f"all images are {'desirable' if rows[0]['label'] else 'undesirable'}"
    if kind == "scored" and len({row["reward"] for row in rows}) == 1:
        return f"all images have the reward {rows[0]['reward']:g}"
    if kind == "ranked" and all(len(set(row["ranks"])) == 1 for row in rows):
        return "all ranks of a prompt are equal"
    return None


def weight_by_prompt(pairs: Sequence[dict]) -> list[dict]:
    """Pairs whose weights sum to 1 for each prompt (with what the pipeline gets beside it), so that prompts with many pairs do not dominate.

    PickScore weights a pair by 1 / `num_example_per_prompt` (https://arxiv.org/abs/2305.01569): the same where every pair is kept.
    """
    totals, tasks = Counter(), [row["prompt"] + key_of(row.get("inputs", {})) for row in pairs]
    for row, task in zip(pairs, tasks):
        totals[task] += row.get("weight", 1.0)
    return [{**row, "weight": row.get("weight", 1.0) / totals[task]} if row.get("weight", 1.0) else row for row, task in zip(pairs, tasks)]


def _pair(prompt: str, better, worse, label: float, weight: float) -> dict:
    return {"prompt": prompt, "image_0": better, "image_1": worse, "label_0": label, "weight": weight}


def ranked_to_pairs(rows: Sequence[dict]) -> list[dict]:
    """All n (n - 1) / 2 pairs of each row, the better image first, each with one over their number as its weight.

    Rank 1 is the best; equal ranks are ties (`label_0` 0.5).
    """
    pairs = []
    for row in rows:
        order = sorted(zip(row["ranks"], row["images"]), key=lambda item: item[0])
        couples = list(combinations(order, 2))
        pairs += [_pair(row["prompt"], a, b, TIE if rank_a == rank_b else 1.0, 1 / len(couples)) for (rank_a, a), (rank_b, b) in couples]
    return pairs


def _by_prompt(rows: Sequence[dict]) -> dict[str, list[dict]]:
    groups: dict[str, list[dict]] = defaultdict(list)
    for row in rows:
        groups[row["prompt"]].append(row)
    return groups


def scored_to_pairs(rows: Sequence[dict], how: str = "best_worst", min_margin: float = 0.0) -> list[dict]:
    """Pairs of images of one prompt, the higher reward first: its best and worst (weight 1), or `how="all"` (weights sum to 1).

    Pairs whose rewards differ by less than `min_margin`, or not at all, are left out.
    """
    if how not in ("best_worst", "all"):
        raise ValueError(f"how must be 'best_worst' or 'all', got {how!r}.")
    pairs = []
    for prompt, group in _by_prompt(rows).items():
        order = sorted(group, key=lambda row: -row["reward"])
        couples = list(combinations(order, 2)) if how == "all" else [(order[0], order[-1])]
        couples = [(a, b) for a, b in couples if a["reward"] - b["reward"] >= min_margin and a["reward"] > b["reward"]]
        pairs += [_pair(prompt, a["image"], b["image"], 1.0, 1 / len(couples)) for a, b in couples]
    return pairs


def scored_to_ranked(rows: Sequence[dict]) -> list[dict]:
    """The images of each prompt with their ranks by reward: 1 + the number of better ones. Prompts with one image are left out."""
    groups = ((prompt, [row["reward"] for row in group], [row["image"] for row in group]) for prompt, group in _by_prompt(rows).items())
    ranked = ((prompt, images, [1.0 + sum(other > reward for other in rewards) for reward in rewards]) for prompt, rewards, images in groups)
    return [{"prompt": prompt, "images": images, "ranks": ranks} for prompt, images, ranks in ranked if len(images) > 1]


def scored_to_binary(rows: Sequence[dict], *, threshold: float | None = None, quantile: float | None = None) -> list[dict]:
    """Desirable where the reward is at least `threshold`, or at least that `quantile` of all rewards (0.8: the best fifth)."""
    if (threshold is None) == (quantile is None):
        raise ValueError("Give either threshold or quantile, not both and not neither.")
    if quantile is not None:
        rewards = sorted(row["reward"] for row in rows)
        threshold = torch.tensor(rewards, dtype=torch.float64).quantile(quantile).item() if rewards else 0.0
    return [{"prompt": row["prompt"], "image": row["image"], "label": row["reward"] >= threshold} for row in rows]


def pairs_to_binary(pairs: Sequence[dict], mixed: str = "desirable") -> list[dict]:
    """Each image of a prompt once: desirable where it only won, undesirable where it only lost.

    Ties say nothing: an image that only tied is left out. `mixed` says what an image is that both won and lost: `desirable` (Diffusion-KTO,
    https://arxiv.org/abs/2404.04465, section 5: it won at least once; `gt_label_wi_l` of the official code), `undesirable` (`w_il`), or `drop` (`w_l`).
    """
    if mixed not in ("desirable", "undesirable", "drop"):
        raise ValueError(f"mixed must be 'desirable', 'undesirable' or 'drop', got {mixed!r}.")
    images: dict = {}
    outcomes: dict = defaultdict(set)
    for row in pairs:
        for name, preference in (("image_0", row["label_0"] - TIE), ("image_1", TIE - row["label_0"])):
            key = (row["prompt"], getattr(row[name], "identity", row[name]))  # a path is its own
            images.setdefault(key, row[name])
            outcomes[key] |= {preference > 0} if preference else set()
    if mixed == "drop":
        images = {key: image for key, image in images.items() if len(outcomes[key]) < 2}
    labels = {key: True in outcomes[key] if len(outcomes[key]) == 1 else mixed == "desirable" for key in images if outcomes[key]}
    return [{"prompt": key[0], "image": images[key], "label": label} for key, label in labels.items()]


def winners(pairs: Sequence[dict]) -> list[dict]:
    """The preferred image of each pair, once for each prompt, for supervised fine-tuning."""
    return desirable(pairs_to_binary(pairs))


def desirable(rows: Sequence[dict]) -> list[dict]:
    """The desirable images, for supervised fine-tuning."""
    return [{"prompt": row["prompt"], "image": row["image"]} for row in rows if row["label"]]


# What `load_preferences` does where a set is of another kind than the one asked for, and how its report calls that.
CONVERSIONS: dict[tuple[str, str], tuple[Callable[[Sequence[dict]], list[dict]], str]] = {
    ("ranked", "pair"): (ranked_to_pairs, "all pairs of each ranking, weight one over their number"),
    ("ranked", "binary"): (lambda rows: pairs_to_binary(ranked_to_pairs(rows)), "an image is desirable if it beat another of its prompt"),
    ("ranked", "captioned"): (
        lambda rows: [{"prompt": r["prompt"], "image": image} for r in rows for image, rank in zip(r["images"], r["ranks"]) if rank == min(r["ranks"])],
        "the best image of each ranking",
    ),
    ("scored", "pair"): (scored_to_pairs, "the best and the worst image of each prompt"),
    ("scored", "ranked"): (scored_to_ranked, "the images of each prompt ranked by reward"),
    ("pair", "binary"): (pairs_to_binary, "an image is desirable if it won at least once"),
    ("pair", "captioned"): (winners, "the images that won at least once"),
    ("binary", "captioned"): (desirable, "the desirable images"),
}
