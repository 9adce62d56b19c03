"""Tasks in processes of their own, each with a time limit."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any

from .cell import NO, Cell
from .worker import guarded


@dataclass
class Task:
    """A call in a process of its own.

    Attributes:
        key: whatever tells it from others.
        call: gets a connection first, to which it sends (column, cell), or (column, None) for one that it begins.
        arguments: the others.
        cells: what it has sent.
        current: the column that it is at.
        seconds: it took.
    """

    key: Any
    call: Callable
    arguments: tuple
    cells: dict[str, Cell] = field(default_factory=dict)
    current: str = ""
    seconds: float = 0.0


@dataclass
class _Running:
    task: Task
    process: Any
    connection: Any
    start: float

    def receive(self) -> bool:
        """Take what was sent; whether there may be more."""
        try:
            while self.connection.poll():
                name, cell = self.connection.recv()
                if cell is None:
                    self.task.current = name
                else:
                    self.task.cells[name or self.task.current or "stock"] = cell
                    self.task.current = ""
        except (EOFError, OSError):
            return False
        return True

    def end(self, reason: str = "") -> Task:
        """Stop the process; the column that it was at gets the reason."""
        if reason:
            self.process.kill()
        self.process.join()
        self.task.seconds = time.monotonic() - self.start
        if not reason and self.process.exitcode:
            reason = f"The process ended with code {self.process.exitcode}."
        if reason and (self.task.current or not self.task.cells):
            self.task.cells[self.task.current or "stock"] = Cell(NO, reason)
        self.connection.close()
        return self.task


def context(preload: list[str]) -> Any:
    """Where processes come from: forks of a server that has imported the modules `preload`."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(preload)
    return server


def run(tasks: Iterable[Task], *, jobs: int, limit: float, source: Any) -> Iterator[Task]:
    """The finished tasks, as they finish.

    Args:
        jobs: how many at once.
        limit: seconds of each; then it is killed, and the column that it is at says so.
        source: the `context`.
    """
    waiting, running = list(tasks)[::-1], []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_started(waiting.pop(), source))
            wait([job.connection for job in running], timeout=0.2)
            for job in list(running):
                more = job.receive()
                late = time.monotonic() - job.start > limit
                if not more or late:
                    running.remove(job)
                    yield job.end(f"Time limit of {limit:g} s." if more else "")
    finally:
        for job in running:
            job.process.kill()
            job.process.join()


def _started(task: Task, source: Any) -> _Running:
    ours, theirs = source.Pipe(duplex=False)
    process = source.Process(target=guarded, args=(task.call, theirs, *task.arguments), daemon=True)
    process.start()
    theirs.close()
    return _Running(task, process, ours, time.monotonic())
