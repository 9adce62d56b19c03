"""A process that trains an epoch each time that it is told to, and says what the epoch took.

    python -m benchmarks.peers.worker NAME '{"method": ...}' [PATH]

NAME is a module of this folder with `train(worker, task, path)`, which calls `Worker.epochs` or `Worker.turn` where its epochs begin. The interpreter
may be another one than this project's: `limit` and the peers need no module of ours.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import torch

from benchmarks.parts import Parts
from benchmarks.peers.tasks import Task

GO = "epoch"


class Worker:
    """One epoch at a time.

    Args:
        orders: a line `epoch` begins one; anything else, or the end, ends the process.
        answers: gets a line of JSON when the worker is ready, and after each epoch.
        leave: ends the process; the training script has more to do.

    Attributes:
        waited: is told the seconds that passed between two epochs: time that is not the training's.
    """

    def __init__(self, orders: TextIO, answers: TextIO, leave: Callable[[], None]):
        self.orders, self.answers, self.leave = orders, answers, leave
        self.parts, self.began = Parts(), None
        self.waited: Callable[[float], None] = lambda seconds: None

    def turn(self) -> None:
        """Between two epochs: say what the last one took, and wait for the next order."""
        if self.began is not None:
            total = time.process_time() - self.began
            own = total - sum(self.parts.seconds.values())
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            self._say({"seconds": total, "own": own, "peak": peak, "parts": dict(self.parts.seconds), **self.parts.counts})
        else:
            self._say({"ready": True})
        since = time.monotonic()
        if self.orders.readline().strip() != GO:
            self.leave()
        self.waited(time.monotonic() - since)
        self.parts.clear()
        self.began = time.process_time()

    def epochs(self) -> Iterator[int]:
        """Numbers of epochs without end, a turn before each: what a script's loop goes over in the place of its own."""
        number = 0
        while True:
            self.turn()
            yield number
            number += 1

    def _say(self, what: dict) -> None:
        self.answers.write(json.dumps(what) + "\n")
        self.answers.flush()


def replaced(text: str, *pairs: tuple[str, str]) -> str:
    """A peer's source with each of `pairs` exchanged.

    Raises:
        ValueError: one is not there exactly once: the checkout is of another version.
    """
    for old, new in pairs:
        if text.count(old) != 1:
            raise ValueError(f"{old!r} is {text.count(old)} times in the peer's source, not once: this harness is for another version of it.")
        text = text.replace(old, new)
    return text


def main() -> None:
    name, given, *path = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what training scripts print
    torch.set_num_threads(1)
    task = Task(**json.loads(given))
    os.chdir(task.folder)
    worker = Worker(sys.stdin, answers, lambda: os._exit(0))
    worker.parts.watch()
    with contextlib.suppress(BrokenPipeError):
        importlib.import_module(f"benchmarks.peers.{name}").train(worker, task, Path(path[0]) if path else None)


if __name__ == "__main__":
    main()
