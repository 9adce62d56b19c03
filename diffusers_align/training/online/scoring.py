"""Scoring in a training run: time limits, rewards that fail, scoring while the next batch is sampled."""

from __future__ import annotations

import contextlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Literal

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ...data.prompts import Prompt, fields_of
from ...driving.outcome import Outcome
from ...rewards import InvalidReward, Reward, RewardError, RewardTimeout, load_reward
from ...rewards.base import listed, score_columns
from ...rewards.patience import OverTime, within
from ...rewards.registry import model_option, reward_name

MAX_PENDING = 2
Row = dict[str, float]


def reward_of_flags(args, device: torch.device, prefix: str = "") -> Reward:
    """The reward of `--reward`, or with the prefix "eval_" of `--eval_reward`, with its model and the patience of `--reward_retries`."""
    model = model_option(getattr(args, f"{prefix}reward_model"))
    return load_reward(getattr(args, f"{prefix}reward"), device=device, retries=args.reward_retries, **model)


class Scorer:
    """Scores the batches of an epoch with one reward, each as it comes or, in the background, while the next is sampled.

    In the background one thread scores batch after batch, so that scores and their order are the same. Rewards that wait
    (for a server) or count on the CPU gain by it; those that share the GPU with the pipeline gain little.

    Args:
        on_nan: where the reward is NaN or infinite: raise, or leave the sample out (NaN).
        on_failure: where the reward raises or takes too long: raise, or leave the samples out. A batch that raises is scored
            again one by one, so that only the samples at fault are lost; one that hangs or gets no answer is not.
        timeout: seconds for a batch. Python cannot end a thread: a call that hangs is left behind, and may go on.
        background: score in a thread; at most `MAX_PENDING` batches wait there.
        advice: the end of an error's message, in words.

    Attributes:
        failures: what failed and was left out, in words.
    """

    def __init__(
        self,
        reward,
        *,
        on_nan: Literal["error", "mask"] = "error",
        on_failure: Literal["error", "mask"] = "error",
        timeout: float | None = None,
        background: bool = False,
        advice: str = "",
    ):
        self.reward, self.on_nan, self.on_failure, self.timeout = reward, on_nan, on_failure, timeout
        self.advice = f"Repair the reward, or leave such samples out with --invalid_rewards mask. {advice}".strip()
        self.failures: list[str] = []
        self._unanswered: Future | None = None
        self._scored: list[tuple[int, Row]] = []
        self._pending: deque[tuple[list[int], Future]] = deque()
        self._thread = ThreadPoolExecutor(1, "reward") if background else None

    @classmethod
    def of_run(cls, reward, args) -> Scorer:
        """As a run's flags have it."""
        policy, advice = args.invalid_rewards, "A run that has a checkpoint goes on from it with --resume_from_checkpoint latest."
        return cls(reward, on_nan=policy, on_failure=policy, timeout=args.reward_timeout, background=args.reward_in_background, advice=advice)

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *exception) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def submit(self, keys: list[int], images: Tensor | Outcome, prompts: list[Prompt]) -> None:
        """Score a batch, now or in the background; its rows will go by `keys`. An earlier batch's exception may come up here."""
        if self._thread is None:
            self._scored += zip(keys, self(images, prompts))
            return
        self._pending.append((keys, self._thread.submit(self, images, prompts)))
        while self._pending and (len(self._pending) > MAX_PENDING or self._pending[0][1].done()):
            self._collect()

    def finish(self) -> list[tuple[int, Row]]:
        """(key, {name: score}) of every sample submitted, in order."""
        while self._pending:
            self._collect()
        return self._scored

    def _collect(self) -> None:
        keys, future = self._pending.popleft()
        self._scored += zip(keys, future.result())

    def __call__(self, images: Tensor | Outcome, prompts: list[Prompt]) -> list[Row]:
        """Score a batch now: images, or an outcome, of which rewards may hear the sound.

        Raises:
            InvalidReward: an answer of a wrong shape; NaN, unless masked.
            RewardError, RewardTimeout: the reward raised or took too long, unless masked.
        """
        try:
            return self._rows(images, prompts)
        except RewardError as error:
            if self.on_failure == "error":
                raise
            if len(prompts) > 1 and not isinstance(error, RewardTimeout) and not isinstance(error.__cause__, (ConnectionError, TimeoutError)):
                return [self(images[i : i + 1], prompts[i : i + 1])[0] for i in range(len(prompts))]
            self.failures.append(str(error))
            return [{"reward": float("nan")} for _ in prompts]

    def _rows(self, made: Tensor | Outcome, prompts: list[Prompt]) -> list[Row]:
        made = made if isinstance(made, Outcome) else Outcome(made)
        images, texts, columns = made.images, [p.text for p in prompts], made.beside(fields_of(prompts))

        def scores() -> dict[str, list[float]]:
            # Threads have their own gradient mode and CUDA device.
            with torch.no_grad(), torch.cuda.device(images.device) if images.is_cuda else contextlib.nullcontext():
                return {name: values.tolist() for name, values in score_columns(self.reward, images, texts, columns, self.on_nan).items()}

        about = f"for {len(texts)} images of the prompts {listed(texts)}"
        try:
            if self._unanswered is not None and not wait([self._unanswered], self.timeout).done:
                raise OverTime(self._unanswered)  # a reward need not bear a second call beside the first
            result = within(self.timeout, scores)
        except InvalidReward:
            raise
        except RewardError as error:  # it has words already, and a full stop
            raise RewardError(f"{error} That was {about}. {self.advice}") from error
        except OverTime as over:
            self._unanswered = over.args[0]
            raise RewardTimeout(
                f"Reward {reward_name(self.reward)!r} gave no answer in {self.timeout:g} s, {about}. Raise --reward_timeout, or: {self.advice}"
            ) from None
        except Exception as error:
            raise RewardError(f"Reward {reward_name(self.reward)!r} raised {type(error).__name__}: {error}, {about}. {self.advice}") from error
        return [{name: values[i] for name, values in result.items()} for i in range(len(texts))]


def gather_scores(run, scorer: Scorer, prompts: list[Prompt]) -> dict[str, Tensor]:
    """The scores of all processes by name, (N,) each, NaN where left out; says which samples are.

    Args:
        prompts: of the N samples, in the order of the scorer's keys.

    Raises:
        InvalidReward: not one sample has a reward, so there is nothing to learn from.
    """
    rows = [row for _, row in sorted(gather_object(scorer.finish()), key=lambda pair: pair[0])]
    scores = columns_of(rows)
    lost = [prompt.text for prompt, value in zip(prompts, scores["reward"].tolist()) if value != value]
    if lost:
        failures = gather_object(list(scorer.failures))
        reason = f" {failures[0]}" if failures else ""
        say = f"Reward {reward_name(scorer.reward)!r} has no score for {len(lost)} of {len(rows)} samples. Prompts: {listed(lost)}.{reason}"
        if len(lost) == len(rows):
            raise InvalidReward(f"{say} Nothing is left to train on: repair the reward or change the prompts.")
        run.print(f"Left out: {say}")
    return scores


def columns_of(rows: list[Row]) -> dict[str, Tensor]:
    """Rows as (N,) tensors by name, NaN where a row lacks the name."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: torch.tensor([row.get(name, float("nan")) for row in rows]) for name in names}
