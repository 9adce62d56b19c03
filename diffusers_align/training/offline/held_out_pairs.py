r"""Implicit accuracy: how often a model, measured against its reference, prefers the better image of a pair that it was not trained on.

The implicit reward of Diffusion-DPO (https://arxiv.org/abs/2311.12908) is the denoising error that the model has less than the reference. A
pair's margin is its winner's minus its loser's, both at the same noise and timesteps, the mean over several draws,

$$ m = \mathbb E_{t, \epsilon}\big[(L_l - L_l^{ref}) - (L_w - L_w^{ref})\big] $$

in the model's own parametrisation, with timesteps uniform over the training range. The accuracy is the share of pairs with m > 0, ties half:
1/2 for the reference itself, by construction.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ...data import LazyImage, load_preferences
from ...data.records import images_of
from ...policy import Policy, noise_seed
from ..run.inputs import check_one_size, condition_of, prompt_of, prompts_of_rows
from .data_latents import LatentImages, Position
from .noised_latents import Noising, as_they_are, predict
from .pairs_and_batches import pairs_of


class HeldOutPairs:
    """A data set of pairs, and the errors that a policy makes at them.

    Args:
        run: of it only the flags and the accelerator are needed.
        source: whatever `load_preferences` takes. Pairs without a winner are left out.
        num_draws: noise and timesteps of a pair, in equal strata.
        reading: other arguments of `load_preferences`.

    Raises:
        ValueError: there are no such pairs.
    """

    def __init__(self, run, source: str, num_draws: int = 8, split: str = "train", **reading: Any):
        self.run = as_they_are(run.args, run.accelerator)
        self.rows, report = load_preferences(source, "pair", split=split, progress=run.accelerator.is_main_process, **reading)
        check_one_size(prompts_of_rows(self.rows), source)
        self.num_draws, self.latents = num_draws, None
        run.print(f"Held-out pairs: {report}")

    def __len__(self) -> int:
        return len(self.rows)

    @torch.no_grad()
    def errors(self, policy: Policy, on_pairs: Callable[[int], Any] = lambda number: None) -> Tensor:
        """Of winner and loser of each pair, (P, 2) float64; the same noise for every policy.

        Every process takes an equal share, some of them a pair again: with a sharded denoiser, one without a batch would leave the others waiting.
        """
        args, accelerator, found = self.run.args, self.run.accelerator, []
        if self.latents is None or self.latents.policy is not policy:  # a roll-out finds their size
            self.latents = LatentImages(self.run, policy, prompt_of(self.rows[0]))
        latents, noising, number, processes = self.latents, Noising(self.run, policy), len(self.rows), accelerator.num_processes
        mine = [i % number for i in range(accelerator.process_index, -(-number // processes) * processes, processes)]
        for start in range(0, len(mine), args.train_batch_size):
            places = [Position(row, noise_seed(args.seed, "held-out pairs", row), 0) for row in mine[start : start + args.train_batch_size]]
            images, _, _ = pairs_of(self.rows, places, policy.device)
            condition = condition_of(policy, [prompt_of(self.rows[place.row]) for place in places], seeds=[place.seed for place in places])
            means = [self._error(policy, noising.draws(latents(side, places, condition), places, condition, self.num_draws)) for side in images]
            found += zip((place.row for place in places), torch.stack(means, 1).cpu())
            on_pairs(len(places) * processes)
        return torch.stack([values for _, values in sorted(dict(gather_object(found)).items())])

    def _error(self, policy: Policy, draws) -> Tensor:
        return torch.stack([side.error(predict(self.run, policy, side)).double() for side in draws]).mean(0)


def margins(errors: Tensor, reference: Tensor) -> Tensor:
    """m of each pair, (P,), of the errors (P, 2) of a policy and of its reference."""
    change = errors - reference
    return change[:, 1] - change[:, 0]


def trained_on(pairs: Sequence[dict], rows: Sequence[dict]) -> int:
    """How many of the pairs show two images that `rows`, of any kind, have under the same prompt. Images without a name of their own (bytes of a
    table) are not looked into."""

    def named(row: dict) -> set[tuple[str, str]]:
        return {(row["prompt"], name) for _, image in images_of(row) if (name := _name_of(image)) is not None}

    known = set().union(*map(named, rows))
    return sum(len(own := named(pair)) == 2 and own <= known for pair in pairs)


def _name_of(image: LazyImage) -> str | None:
    return image.uid or (os.path.abspath(image.source) if isinstance(image.source, Path) else None)
