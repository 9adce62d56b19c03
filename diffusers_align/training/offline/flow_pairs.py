"""What a preference flow is trained on and judged by: latents of image pairs, outputs to transport, the pipeline and its card.

`train_pfm.py` alone has it: its model is no policy, so that nothing of the other scripts fits.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ... import __version__
from ...data import LazyImage, Prompt
from ...data.conversions import apply_ties
from ...files.paths import front_door
from ...files.weight_files import settle_all
from ...rewards import InvalidReward
from ..online.scoring import Scorer, columns_of
from ..report.model_card import front_matter, page, published_as
from ..report.pictures import before_and_after
from ..report.pictures import save as save_picture
from ..report.statistics import WinRate, in_words, win_rate


@dataclass(frozen=True)
class Pairs:
    """Less and more preferred images of the same prompts in the space of the flow: y0, y1 (N, *D) and weights (N,), on the CPU."""

    y0: Tensor
    y1: Tensor
    weight: Tensor
    prompts: list[str]

    def __len__(self) -> int:
        return len(self.prompts)


def split_by_prompt(rows: list[dict], held_out: float, seed: int) -> tuple[list[dict], list[dict]]:
    """Rows to train on and rows held out: those of a random share of the prompts, at least one if `held_out` > 0. No prompt is in both.

    Raises:
        ValueError: one side would be empty.
    """
    prompts = sorted({row["prompt"] for row in rows})
    number = max(1, round(held_out * len(prompts))) if held_out > 0 else 0
    if number >= len(prompts):
        raise ValueError(f"Of {len(prompts)} prompts, {number} would be held out and none be left: give pairs of more prompts, or --held_out 0.")
    chosen = set(random.Random(f"{seed}/held out").sample(prompts, number))
    return [row for row in rows if row["prompt"] not in chosen], [row for row in rows if row["prompt"] in chosen]


def open_images(pipeline, images: list[LazyImage], resolution: int | None) -> Tensor:
    """(N, 3, H, W) in [0, 1]: as they are, or resized to `resolution` squared.

    Raises:
        ValueError: they differ in size and no resolution is given.
    """
    opened = [image.open() for image in images]
    if resolution is None:
        _check_sizes({image.size for image in opened})
    return pipeline.image_processor.preprocess(opened, resolution, resolution)


def _check_sizes(sizes: set[tuple[int, int]]) -> None:
    if len(sizes) > 1:
        raise ValueError(f"The images have different sizes ({', '.join(f'{w}x{h}' for w, h in sorted(sizes)[:3])}): give one with --resolution.")


def decided(rows: list[dict], source: str) -> list[dict]:
    """The canonical pairs that have a winner: a flow leads from losers to winners, and has no place for ties nor for how sure a preference is. Says how many
    have one or the other.

    Raises:
        ValueError: all are ties.
    """
    found, ties = apply_ties(rows, "drop")
    if not found:
        raise ValueError(f"{source}: all pairs are ties, so there is nothing to learn. Give other data.")
    if ties:
        print(f"{ties} of {len(rows)} pairs are ties and left out: a flow leads from a loser to a winner.")
    if soft := sum(0 < row["label_0"] < 1 for row in found):
        print(f"{soft} of {len(found)} labels lie between 0 and 1: a flow takes the side above 0.5 for the winner, however sure that is.")
    return found


@torch.no_grad()
def encode_pairs(pipeline, rows: list[dict], batch_size: int, resolution: int | None, device: torch.device) -> Pairs:
    """The winners and losers of canonical pairs through the pipeline's `encode`, padded as its call does."""
    sides: list[list[Tensor]] = [[], []]
    sizes: set[tuple[int, int]] = set()
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        for side, wins in zip(sides, (False, True)):
            images = [row["image_0"] if (row["label_0"] > 0.5) == wins else row["image_1"] for row in part]
            pixels = open_images(pipeline, images, resolution)
            _check_sizes(sizes := sizes | {(pixels.shape[3], pixels.shape[2])})
            side.append(pipeline.encode(pipeline.padded(pixels.to(device))).cpu())
    y0, y1 = (torch.cat(side) for side in sides)
    return Pairs(y0, y1, torch.tensor([row.get("weight", 1.0) for row in rows]), [row["prompt"] for row in rows])


@dataclass(frozen=True)
class Transported:
    """Images before and after the flow, and their rewards by name, (N,) each."""

    prompts: list[str]
    before: list[Tensor]
    after: list[Tensor]
    rewards: dict[str, tuple[Tensor, Tensor]]

    def check_scored(self, names: Iterable[str]) -> None:
        """Raise an InvalidReward if one of the rewards `names` scored not one output on both sides."""
        for name in names:
            before, after = self.rewards[name]
            if (before + after).isnan().all():
                raise InvalidReward(
                    f"Reward {name!r} scored none of {len(self.prompts)} outputs, so nothing says what the flow does. A reward that needs other fields of a "
                    "prompt than its text finds them in --prompts, looked up by the text."
                )

    def win_rates(self) -> dict[str, WinRate]:
        """Of transported over original images."""
        return {name: win_rate(after, before) for name, (before, after) in self.rewards.items()}


def transport_outputs(run, pipeline, outputs: list[tuple[Prompt, LazyImage]], rewards: dict[str, Any], **call: Any) -> Transported:
    """Carry the outputs along the flow and score them before and after. The processes share the work, all get the whole.

    A reward that raises stops here; NaN is left out of means and win rates.
    """
    args, accelerator, rows = run.args, run.accelerator, []
    scorers = {name: Scorer(reward, on_nan="mask") for name, reward in rewards.items()}
    mine = list(range(len(outputs)))[accelerator.process_index :: accelerator.num_processes]
    pipeline.set_progress_bar_config(disable=True)
    for start in range(0, len(mine), args.train_batch_size):
        part = mine[start : start + args.train_batch_size]
        prompts = [outputs[i][0] for i in part]
        before = open_images(pipeline, [outputs[i][1] for i in part], args.resolution).to(accelerator.device)
        with accelerator.autocast():
            after = pipeline(before, [prompt.text for prompt in prompts], output_type="pt", **call).images.float()
        scored = {name: list(zip(scorer(before, prompts), scorer(after, prompts))) for name, scorer in scorers.items()}
        rows += [(i, before[j].cpu(), after[j].cpu(), {name: pairs[j] for name, pairs in scored.items()}) for j, i in enumerate(part)]
    rows = sorted(gather_object(rows), key=lambda row: row[0])
    by_name: dict[str, tuple[Tensor, Tensor]] = {}
    for name in rewards:
        columns = [columns_of([row[3][name][side] for row in rows]) for side in (0, 1)]
        by_name |= {name if key == "reward" else f"{name}/{key}": (columns[0][key], columns[1][key]) for key in columns[0]}
    return Transported([outputs[i][0].text for i, *_ in rows], [row[1] for row in rows], [row[2] for row in rows], by_name)


def describe(transported: Transported, asked: Iterable[str]) -> dict[str, str]:
    """The rewards before and after and the win rate, as a line each; none of a component that no prompt asks for (all NaN)."""
    lines = {}
    for name, rate in transported.win_rates().items():
        if rate.wins + rate.ties + rate.losses == 0:
            if name in asked:
                lines[name] = f"no score for any of {len(transported.prompts)} outputs"
            continue
        before, after = transported.rewards[name]
        if name not in asked:  # a part of a reward, which may apply to some prompts alone
            before, after = (values[~(before.isnan() | after.isnan())] for values in (before, after))
        lines[f"{name}, before"], lines[f"{name}, after"] = in_words(before), in_words(after)
        lines[f"{name}, paired gain"] = in_words(after - before, "+.4f")
        lines[f"{name}, win rate"] = f"{rate.rate:.1%} [{rate.low:.1%}, {rate.high:.1%}], {rate.wins + rate.ties + rate.losses} images, {rate.ties} ties"
    return lines


def save(run, pipeline, transported: Transported, asked: Iterable[str], judged: str) -> None:
    """The pipeline with the file that loads it, the picture, and the model card, in the output folder."""
    args, folder = run.args, run.output_dir
    pipeline.save_pretrained(folder)
    for name in pipeline.components:
        settle_all(folder / name)
    shutil.copy(front_door("pipelines", "preference_flow"), folder)
    number = args.num_validation_images
    shown = [values[:number] for values in (transported.before, transported.after, transported.prompts)]
    if number:
        save_picture(before_and_after(*shown), folder / "before_after.png")
    (folder / "README.md").write_text(_card(run, describe(transported, asked), judged), encoding="utf-8")


def _card(run, results: dict[str, str], judged: str) -> str:
    args, repo = run.args, published_as(run)
    front = front_matter(args.pretrained_model_name_or_path, ["preference-flow-matching", "image-to-image"], "image-to-image", data=args.dataset_name)
    text = (
        f"A preference flow (https://arxiv.org/abs/2405.19806), trained with diffusers-align {__version__}: it carries any images, whoever made them, to "
        "preferred ones."
    )
    call = f"num_inference_steps={args.num_inference_steps}, iterations={args.iterations}, strength={args.strength:g}, solver={args.solver!r}"
    code = f"""from diffusers_align.pipelines.preference_flow import PreferenceFlowPipeline

pipe = PreferenceFlowPipeline.from_pretrained("{repo}")
images = pipe(images, prompts, {call}).images"""
    caption = f"Outputs of {judged} before and after the flow (mean ± standard error; 95 % interval of the win rate):"
    pictures = [name for name in ("before_after.png", "reward_curve.png") if (run.output_dir / name).is_file()]
    return page(run, front, repo, text, code, caption, results, pictures)
