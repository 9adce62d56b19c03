"""Workers in turns: one epoch of one process at a time, A B C and back C B A, so that what changes on the machine meets all alike."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from pathlib import Path

from benchmarks.one_thread import ENVIRONMENT, ROOT, Failed
from benchmarks.peers.tasks import Task

Epoch = dict[str, float]


class Player:
    """A worker process.

    Args:
        command: that runs `benchmarks.peers.worker`, or what speaks like it.
        log: gets what it prints.
    """

    def __init__(self, name: str, command: list[str], log: Path):
        self.name, self.command, self.log, self.process = name, command, log, None

    def begin(self) -> None:
        """Start the process, and wait until its first epoch can begin."""
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log.open("w"), "text": True}
        self.process = subprocess.Popen(self.command, env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path}, cwd=ROOT, **pipes)
        self.answer()

    def answer(self) -> Epoch:
        """What the worker says next.

        Raises:
            benchmarks.one_thread.Failed: it ended.
        """
        line = self.process.stdout.readline()
        if not line:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-8:])
            raise Failed(f"{self.name} ended with status {self.process.wait()}; its output is in {self.log}:\n{tail}")
        return json.loads(line)

    def epoch(self) -> Epoch:
        """One epoch and what it took."""
        self.process.stdin.write("epoch\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        if self.process is None:
            return
        self.process.stdin.close()
        self.process.wait()


def play(players: list[Player], rounds: int) -> dict[str, list[Epoch]]:
    """`rounds` epochs of each, in turns, after one that is thrown away."""
    for player in players:
        player.begin()
    found: dict[str, list[Epoch]] = {player.name: [] for player in players}
    for number in range(rounds + 1):
        for player in players if number % 2 == 0 else players[::-1]:
            epoch = player.epoch()
            if number:
                found[player.name].append(epoch)
    return found


def check(found: dict[str, list[Epoch]], task: Task) -> None:
    """All did the task's work, and trained as many weights.

    Raises:
        ValueError: one did not: its time says nothing.
    """
    trainable = {epoch["trainable"] for epochs in found.values() for epoch in epochs}
    if len(trainable) != 1:
        raise ValueError(f"The workers train different numbers of weights: { {name: epochs[0]['trainable'] for name, epochs in found.items()} }.")
    for name, epochs in found.items():
        for what, number in task.work.items():
            if wrong := [epoch[what] for epoch in epochs if epoch[what] != number]:
                raise ValueError(f"{name}: {wrong[0]} {what} in an epoch, where the task has {number}.")


def ratio(ours: list[Epoch], other: list[Epoch]) -> str:
    """The median of the rounds' ratios of seconds, and the extremes."""
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(ours, other)]
    return f"{statistics.median(ratios):.3f} [{min(ratios):.2f}, {max(ratios):.2f}]"


def table(found: dict[str, list[Epoch]]) -> str:
    """Medians of each worker, and ours beside each."""
    lines = ["| | seconds | / limit | ours / it | rows | seconds outside of the parts | share | peak RSS, MiB |", "|" + "---|" * 8]
    for name, epochs in found.items():
        median = {key: statistics.median(epoch[key] for epoch in epochs) for key in ("seconds", "own", "peak", "rows")}
        beside = ratio(epochs, found["limit"]) if "limit" in found and name != "limit" else ""
        ours = ratio(found["ours"], epochs) if "ours" in found and name != "ours" else ""
        share = f"{median['own'] / median['seconds']:.1%}"
        lines.append(f"| {name} | {median['seconds']:.3f} | {beside} | {ours} | {median['rows']:.0f} | {median['own']:.3f} | {share} | {median['peak']:.0f} |")
    return "\n".join(lines)
