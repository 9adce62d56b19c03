"""What an epoch's updates leave: numbers to log, the samples that had no reward, and gradient norms, by which later ones are clipped."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ...rewards import InvalidReward
from ...rewards.base import listed
from ...rewards.registry import reward_name
from .losses import finite

# So many gradient norms make a quantile, so many are remembered.
MIN_NORMS, MAX_NORMS = 10, 100


class EpochLog(defaultdict):
    """What this process saw in an epoch: lists of numbers by name, of which the mean is logged.

    Attributes:
        norms: of the gradient, one per optimizer step.
        asked, unscored: texts of all samples, and of those that the reward could not score.
        failures: of the reward, in words.
    """

    def __init__(self):
        super().__init__(list)
        self.norms: list[float] = []
        self.asked: list[str] = []
        self.unscored: list[str] = []
        self.failures: list[str] = []

    def add_rewards(self, batch, rewards: Tensor, args) -> None:
        """The rewards (B,) of a batch, NaN where there is none; with `--reward_map hinge` also which of them lie above the target, and so have no gradient."""
        texts = [prompt.text for prompt in batch.asked]
        self["reward"] += finite(rewards)
        if args.reward_map == "hinge":
            self["hinge_inactive"] += [float(reward >= args.reward_target) for reward in finite(rewards)]
        self.asked += texts
        self.unscored += [text for text, value in zip(texts, rewards.tolist()) if value != value]
        self.failures += batch.reward.failures

    def metrics(self, run, report) -> dict[str, float]:
        """Of all processes; says which samples were left out.

        Raises:
            InvalidReward: not one sample has a reward, so there was nothing to learn from.
        """
        asked, unscored, failures = (gather_object(list(own)) for own in (self.asked, self.unscored, self.failures))
        say = f"Reward {reward_name(report.reward)!r} has no score for {len(unscored)} of {len(asked)} samples. Prompts: {listed(unscored)}."
        say = " ".join([say, *failures[:1]])
        if len(unscored) == len(asked):
            raise InvalidReward(f"{say} Nothing is left to train on: repair the reward or change the prompts.")
        metrics = run.epoch_metrics(None, [], self.norms, self)
        if not unscored:
            return metrics
        run.print(f"Left out: {say}")
        return {**metrics, "invalid_rewards": float(len(unscored))}


class GradientClip:
    """Clips an update's gradient at `--max_grad_norm` and, with `--grad_clip_quantile`, at that quantile of the norms before: one
    outlier does not move the weights further than others do. Resumes with the run."""

    def __init__(self, run):
        self.run, self.norms = run, []
        run.register("gradient_clip", self)

    @property
    def limit(self) -> float:
        quantile, most = self.run.args.grad_clip_quantile, self.run.args.max_grad_norm or math.inf
        if quantile is None or len(self.norms) < MIN_NORMS:
            return most
        return min(most, float(torch.tensor(self.norms, dtype=torch.float64).quantile(quantile)))

    def step(self) -> float:
        """The optimizer step. Returns the gradient's norm before clipping."""
        norm = self.run.optimizer_step(self.limit)
        if norm < float("inf"):
            self.norms = [*self.norms, norm][-MAX_NORMS:]
        return norm

    def state_dict(self) -> dict[str, Any]:
        return {"norms": self.norms}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.norms = list(state["norms"])
