"""Ends a run that no longer gains on held-out prompts, whose pictures become alike or that hacks its reward, and keeps its best weights.

A reward model can be satisfied in ways that nobody wants, and a run that goes on finds them. Every validation is looked at: it is the best
so far if its pictures are varied enough, a reward that took no part has not fallen, and its held-out reward is the highest, the pretrained
model's included. Papers on reward gradients do this by eye (https://arxiv.org/abs/2309.17400, https://arxiv.org/abs/2310.03739), so none
gives a patience or a bound: the defaults are ours.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from ...data.prompts import Prompt
from ..online.sampling import Evaluation, paired_gain
from ..report.statistics import diversity, mean_and_error, pairwise_rms
from .symptoms import MANY_MISSING
from .weight_copies import LaggingWeights


class EarlyStop:
    """Looks at a run's validations. All processes see the same and stop together; checkpoints hold what it knows.

    Args:
        prompts: that are validated on.

    Raises:
        ValueError: diversity is watched, and a prompt has one image.

    Attributes:
        tasks: keys of the prompts of the validations' images.
        epoch: of the best weights, epochs done; 0 is the pretrained model.
        seen: the last epoch that was looked at; None before the first.
    """

    def __init__(self, run, prompts: list[Prompt]):
        self.run, self.args = run, run.args
        self.weights: LaggingWeights | None = None
        self.epoch, self.seen, self.best, self.stale, self.variety, self.first_variety = 0, None, None, 0, None, None
        self.first_scores: dict[str, Tensor] = {}
        self.fall = 0.0  # of the reward that took no part, in standard errors
        self.lost: dict[str, float] = {}  # by reward, the share of images that had a score at first and have none now
        number = self.args.num_eval_samples
        asked = [prompts[i % len(prompts)] for i in range(number)]
        self.tasks = [prompt.key for prompt in asked]
        counts = Counter(self.tasks)
        if self.args.early_stop_diversity is not None and (lonely := next((prompt.text for prompt in asked if counts[prompt.key] < 2), None)) is not None:
            raise ValueError(
                f"Diversity needs at least two images of each prompt, but --num_eval_samples {number} gives {lonely!r} only one. "
                f"Raise it to {2 * len(prompts)}, or give fewer --eval_prompts."
            )
        run.register("early_stop", self, fresh=lambda: None)

    @classmethod
    def of_run(cls, run, prompts: list[Prompt]) -> EarlyStop | None:
        """What the flags ask for; None if that is nothing. Validations that are too far apart to end the run are said."""
        wanted = run.args.early_stop_metric or run.args.early_stop_diversity is not None or run.args.early_stop_hacking is not None
        if not wanted:
            return None
        run.explain_once(*too_late(run.args))
        return cls(run, prompts)

    @property
    def reason(self) -> str | None:
        """Why the run is to stop now; None to go on."""
        if self._uniform:
            return f"diversity fell to {self.variety:.4g}, below {self.args.early_stop_diversity:g} of the pretrained model's {self.first_variety:.4g}"
        if self.args.early_stop_hacking is not None and self.lost.get(self.args.eval_reward, 0.0) >= MANY_MISSING:
            return f"{self.args.eval_reward} has no score for {self.lost[self.args.eval_reward]:.0%} of the images that it could score before training"
        if self._hacked:
            return f"{self.args.eval_reward} fell by {self.fall:.1f} standard errors below the pretrained model's, more than {self.args.early_stop_hacking:g}"
        if self.args.early_stop_metric is not None and self.stale >= self.args.early_stop_patience:
            return f"{self.args.early_stop_metric} has not risen above {self.best:.4g} for {self.stale} validations"
        return None

    @property
    def _uniform(self) -> bool:
        share = self.args.early_stop_diversity
        return share is not None and self.variety is not None and self.variety < share * self.first_variety

    @property
    def _hacked(self) -> bool:
        return self.args.early_stop_hacking is not None and self.fall > self.args.early_stop_hacking

    @property
    def _unscored(self) -> bool:
        """Whether a reward has lost the scores of too many images for its mean to say anything: pictures that a judge cannot read are no gain."""
        return max(self.lost.values(), default=0.0) >= MANY_MISSING

    def look(self, epoch: int, evaluation: Evaluation) -> None:
        """Take in a validation after so many epochs, with all its images, of the weights that are in place: the best are kept."""
        self.seen = epoch
        self.measure(evaluation)
        over = self._uniform or self._hacked
        if over and self.weights is not None:
            return
        value = -math.inf if over or self._unscored else self._value(evaluation)
        if self.best is not None and not value > self.best:
            self.stale += 1
            return
        self.epoch, self.best, self.stale = epoch, value, 0
        if self.weights is None:
            self.weights = LaggingWeights(self.run.parameters)
        self.weights.update(0.0)

    def begin(self, evaluation: Evaluation) -> None:
        """Take in the pretrained model's images, as each start of a run evaluates them: for rewards that were not watched before, or on other images."""
        for name in self._watched:
            if len(self.first_scores.get(name, ())) != len(evaluation.rewards[name]):
                self.first_scores[name] = evaluation.rewards[name].double().cpu()
        if self.args.early_stop_diversity is not None and self.first_variety is None:
            self.first_variety = self._variety(evaluation)

    def _variety(self, evaluation: Evaluation) -> float:
        return float(diversity(torch.stack(evaluation.images).flatten(1), self.tasks, pairwise_rms).mean())

    def measure(self, evaluation: Evaluation) -> None:
        """How varied it is, how far the reward that took no part has fallen, and how many scores are lost. The first one is what the others are compared
        with: the pretrained model's, also where the weights in place are others, as in a run that is resumed and has had no early stop before."""
        if self.args.early_stop_diversity is not None:
            self.variety = self._variety(evaluation)
            self.first_variety = self.variety if self.first_variety is None else self.first_variety
        for name in self._watched:
            scores = evaluation.rewards[name].double().cpu()
            first = self.first_scores.setdefault(name, scores)
            self.lost[name] = lost_share(first, scores)
        if self.args.early_stop_hacking is not None:
            self.fall = fall_in_errors(self.first_scores[self.args.eval_reward], evaluation.rewards[self.args.eval_reward].double().cpu())

    @property
    def _metric(self) -> str | None:
        """The reward that is to rise, by its name in evaluations."""
        return self.args.eval_reward if self.args.early_stop_metric == "eval_reward" else self.args.early_stop_metric

    @property
    def _watched(self) -> list[str]:
        names = (self._metric, self.args.eval_reward if self.args.early_stop_hacking is not None else None)
        return [name for name in names if name is not None]

    def _value(self, evaluation: Evaluation) -> float:
        """What is to rise: the held-out reward; without one, the epoch, so that the latest weights that are good enough are the best.

        It is the first mean and the paired gain over it: the mean itself where all images have a score, and no mean of other images where some have none.
        """
        if self._metric is None:
            return self.seen
        first, now = self.first_scores[self._metric], evaluation.rewards[self._metric].double().cpu()
        value = mean_and_error(first)[0] + paired_gain(first, now)[0]
        return -math.inf if math.isnan(value) else value

    def summary(self) -> str:
        """Which weights were kept, and why the run stopped if it did."""
        stopped = f"Stopped after epoch {self.seen}: {self.reason}. " if self.reason else ""
        place = f"after epoch {self.epoch}" if self.epoch else "before training"
        why = "the best of the validations" if self.best is None or self.best > -math.inf else "the first that were looked at; no validation was good"
        return f"{stopped}The weights are those {place}, {why}."

    def state_dict(self) -> dict[str, Any]:
        numbers = {name: getattr(self, name) for name in ("epoch", "seen", "best", "stale", "variety", "first_variety", "fall", "lost")}
        first = {name: scores.tolist() for name, scores in self.first_scores.items()}
        return {**numbers, "first_scores": first, "weights": self.weights and self.weights.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        weights = state["weights"]
        self.__dict__.update({name: value for name, value in state.items() if name not in ("weights", "first_scores")})
        first = state.get("first_scores", {})  # checkpoints of the last version have none: `begin` fills them
        self.first_scores = {name: torch.tensor(scores, dtype=torch.float64) for name, scores in first.items()}
        if weights is not None:
            self.weights = LaggingWeights(self.run.parameters)
            self.weights.load_state_dict(weights)


def too_late(args) -> list[str]:
    """What to say where the run has come to its end before an early stop could end it; nothing elsewhere."""
    at_once = args.early_stop_diversity is not None or args.early_stop_hacking is not None
    earliest = args.validation_epochs * (1 if at_once else args.early_stop_patience)
    if earliest < args.num_epochs:
        return []
    return [
        f"The early stop looks every {args.validation_epochs} epochs (--validation_epochs), so that it could end a run after epoch {earliest} at the earliest, "
        f"and this one has {args.num_epochs}: it only chooses which weights are kept. Lower --validation_epochs."
    ]


def lost_share(before: Tensor, after: Tensor) -> float:
    """Of the images that have a score in `before` (N,), those that have none (NaN) in `after`."""
    scored = ~before.isnan()
    return float((scored & after.isnan()).sum() / scored.sum().clamp(min=1))


def fall_in_errors(before: Tensor, after: Tensor) -> float:
    """How many standard errors of their paired difference the mean of (N,) rewards has fallen by; negative if it rose, NaN if fewer than two were scored."""
    gain, error = paired_gain(before, after)
    if error > 0 or math.isnan(error):
        return -gain / error
    return math.copysign(math.inf, -gain) if gain else 0.0
