"""Whether a run learns anything: a look after each epoch, words about the first one, and a verdict at the end.

A run has learned nothing if no weight has moved, if every gradient was 0, or if in no epoch two rewards differed where rewards are compared:
whatever moves the weights then is no reward. It looks like any other in its files, so it says so aloud and ends with a status other than 0.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .symptoms import symptoms_of, worse_than_chance

# Epochs without a moved weight after which a run ends by itself. A loss scaler's first steps and rare rewards may well cost a few.
PATIENCE = 10


class Start:
    """The weights that training starts from, to see whether they have moved.

    Parameters that are 0 before any training (the B of a LoRA) speak for all: weight decay alone moves the others, and changes nothing
    that the model computes. A move below the resolution of float32 at the scale of the weights is none.
    """

    def __init__(self, parameters: list[nn.Parameter]):
        zero = [parameter for parameter in parameters if not parameter.detach().any()]
        self.parameters = zero or list(parameters)
        self.resolution = torch.finfo(torch.float32).eps * max((float(p.detach().abs().max()) for p in parameters if p.numel()), default=0.0)
        self.values: list[Tensor] = []

    def mark(self) -> None:
        """Remember the weights as they are."""
        self.values = [parameter.detach().to("cpu", copy=True) for parameter in self.parameters]

    def moved(self) -> bool:
        """Whether any weight lies elsewhere than at `mark`; one that has become NaN does."""
        return any(not float((p.detach().cpu() - value).abs().max()) <= self.resolution for p, value in zip(self.parameters, self.values) if value.numel())


@dataclass
class Seen:
    """What an epoch, or a run, showed.

    Attributes:
        row: metrics of the (last) epoch.
        number: samples of an epoch, if known.
        made, skipped: optimizer steps, and those that a loss scaler left out.
        rates: learning rates of the epoch's steps.
        moved: whether a weight has moved since the start.
    """

    row: dict[str, float]
    args: Any
    number: int | None
    made: int
    skipped: int
    rates: list[float]
    moved: bool

    def symptoms(self) -> list[str]:
        """What is wrong: what was seen, the likely cause, what to change."""
        return list(symptoms_of(self))


class Health:
    """The health of one run, from its start or from the checkpoint that it goes on from.

    Attributes:
        compares_rewards: whether the method learns from how the rewards of an epoch's samples differ; otherwise it may learn where they are equal. The
            script says so.
    """

    def __init__(self, run):
        self.run = run
        self.start: Start | None = None
        self.epochs, self.silent, self.gradient, self.moved = 0, 0, 0.0, False
        self.warned_of_pairs, self.compares_rewards = False, True
        self._made = 0

    def watch(self, parameters: list[nn.Parameter]) -> None:
        """What is trained, before anything is trained or loaded."""
        self.start = Start(parameters)

    def begin(self) -> None:
        """Training starts, with the weights as they are."""
        if self.start is None:
            self.moved = True  # there is nothing to tell it by
        else:
            self.start.mark()
        self._made = self.run.optimizer_steps

    def look(self) -> None:
        """After each epoch; says what it sees of the first one."""
        row = self._row()
        self.epochs += 1
        self.silent += row.get("zero_std", 0.0) == 1.0
        self.gradient = max(self.gradient, row.get("grad_norm", 1.0))
        if not self.moved and self.start.moved():
            self.moved, self.start.values = True, []  # once is enough
        if self.epochs == 1:
            self._say(self._seen())
        self._look_at_pairs()

    def _look_at_pairs(self) -> None:
        run = self.run
        found = None if self.warned_of_pairs else worse_than_chance(run.history, run.args, run.optimizer_steps)
        if found:
            self.warned_of_pairs = True
            run.print(_banner("WARNING: look at this.", [found]))

    @property
    def learned_nothing(self) -> bool:
        """Whether epochs were trained, and not one had an effect that it was meant to have."""
        return self.epochs > 0 and (not self.moved or self.gradient == 0.0 or self.silent == self.epochs)

    @property
    def hopeless(self) -> bool:
        """Whether to end now: nothing has moved for so long that nothing will."""
        return self.epochs >= PATIENCE and not self.moved and not self._allowed

    @property
    def kept_start(self) -> bool:
        """Whether an early stop found nothing better than the weights before training, which are those that the run leaves."""
        stop = self.run.early_stop
        return self.epochs > 0 and stop is not None and stop.epoch == 0

    @property
    def failed(self) -> bool:
        """Whether nothing was learned, and `--allow_no_signal` does not say that it may be so."""
        return self.learned_nothing and not self._allowed

    @property
    def _allowed(self) -> bool:
        return bool(getattr(self.run.args, "allow_no_signal", False))

    def _row(self) -> dict[str, float]:
        """The metrics of the epoch that has just ended, none if the script has logged none; without `zero_std` where that is no lack of a signal."""
        history = self.run.history
        row = history[-1] if history and history[-1]["epoch"] == self.run.epoch - 1 else {}
        if not self.compares_rewards or self._compared_with_other_epochs():
            row = {name: value for name, value in row.items() if name != "zero_std"}
        return row

    def _compared_with_other_epochs(self) -> bool:
        """Whether an epoch has one sample, whose reward is another than those before it: a learned value compares the two."""
        division = self.run.division
        return division is not None and division.num_samples == 1 and len({row.get("reward") for row in self.run.history}) > 1

    def _seen(self) -> Seen:
        run, made = self.run, self.run.optimizer_steps - self._made
        return Seen(self._row(), run.args, run.division and run.division.num_samples, made, run.skipped_steps, list(run.rates), self.moved)

    def _say(self, seen: Seen) -> None:
        run, found = self.run, seen.symptoms()
        run.print(f"Health after epoch {run.epoch}: {in_words(seen)}.")
        if not self.moved and not found:
            found = ["No weight has moved yet."]
        if found:
            run.print(_banner("WARNING: nothing was learned in this epoch." if self.learned_nothing else "WARNING: look at this.", found))

    def verdict(self) -> None:
        """At the end, with all files written.

        Raises:
            SystemExit: the run has `failed`.
        """
        run = self.run
        if not self.learned_nothing:
            if self.kept_start:
                run.print("WARNING: no validation was better than that before training, whose weights are kept: lower --learning_rate or validate more often.")
            if 2 * self.silent >= self.epochs > 1:
                run.print(f"WARNING: {self.silent} of {self.epochs} epochs had no signal: no two rewards of a group differed (zero_std 1).")
            return
        title, causes = self._diagnosis()
        text = _banner(f"NOTHING WAS LEARNED: {title}.", causes or ["See metrics.jsonl for what its epochs had in common."])
        if not self.failed:
            run.print(text)
            return
        if run.is_main:
            kept = " They were not pushed to the Hub." if run.args.push_to_hub else ""
            files = f"The files in {run.output_dir} are complete.{kept} The exit status is 1; with --allow_no_signal it would be 0."
            print(f"{text}\n{files}", file=sys.stderr, flush=True)
        raise SystemExit(1)

    def for_card(self) -> str:
        """That nothing was learned, for those who get the files without the exit status; nothing of a run that has learned."""
        return f"Nothing was learned: {self._diagnosis()[0]}." if self.learned_nothing else ""

    def _diagnosis(self) -> tuple[str, list[str]]:
        """In what sense nothing was learned, and why."""
        epochs, causes = _count(self.epochs, "epoch"), self._seen().symptoms()
        if not self.moved:
            early = f", and ended by itself after {PATIENCE} epochs without a change" if self.hopeless else ""
            return f"after {epochs} the weights are those that it started from{early}", causes
        if self.gradient == 0.0:
            return f"in {epochs} every gradient was 0", causes
        return f"in {epochs} no two rewards that are compared differed", causes


def in_words(seen: Seen) -> str:
    """An epoch's numbers, as far as it has them."""
    row, parts = seen.row, []
    if "zero_std" in row:
        parts.append(f"{1 - row['zero_std']:.0%} of the groups have rewards that differ")
    if row.get("invalid_rewards") and seen.number:
        parts.append(f"{row['invalid_rewards'] / seen.number:.0%} of the rewards are missing")
    if "grad_norm" in row:
        parts.append(f"gradient norm {row['grad_norm']:.3g}")
    rate = f" at learning rate {max(seen.rates):.3g}" if seen.rates else ""
    skipped = f", {seen.skipped} more skipped by the loss scaler" if seen.skipped else ""
    parts.append(f"{_count(seen.made, 'optimizer step')}{rate}{skipped}")
    if "ratio_error" in row:
        parts.append(f"ratio error {row['ratio_error']:.2g}")
    return ", ".join([*parts, "the weights have moved" if seen.moved else "no weight has moved"])


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _banner(title: str, lines: list[str]) -> str:
    return "\n".join(["=" * 100, title, *(f"  * {line}" for line in lines), "=" * 100])
