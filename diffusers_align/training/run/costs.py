"""What a training run has spent so far, over all processes and resumes: samples, denoiser rows, wall time."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch import nn

from ...driving.replacements import InPlace

FILE = "costs.json"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cost:
    """What training has cost, evaluation left out.

    Attributes:
        images: samples that were generated to train on, and candidates of which they were chosen.
        denoiser_evaluations: rows through the denoisers: a call on a batch of 8 under classifier-free guidance counts 16. Gated calls,
            which return zeros, count nothing.
        denoiser_evaluations_with_gradients: those among them that built a graph; gradient checkpointing computes them once more.
        seconds: wall time of the epochs, rewards and checkpoints included.
        processor_seconds: of the CPUs in that time, all processes together: on a machine with other work, what compares.
    """

    images: int = 0
    denoiser_evaluations: int = 0
    denoiser_evaluations_with_gradients: int = 0
    seconds: float = 0.0
    processor_seconds: float = 0.0

    @classmethod
    def read(cls, folder: str | Path) -> Cost | None:
        """What a run, or one of its checkpoints, recorded in `folder`; None if nothing did, or, with a warning, if it cannot be read."""
        path = Path(folder) / FILE
        try:
            return cls(**json.loads(path.read_text())) if path.is_file() else None
        except (ValueError, TypeError) as error:
            logger.warning("%s does not say what a run has cost (%s): its costs are left out.", path, error)
            return None

    def write(self, folder: str | Path) -> None:
        """Write `costs.json` into `folder`."""
        (Path(folder) / FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")


class Meter:
    """Counts this process's costs while `running`; `total` adds up the processes and what was spent before a resume.

    It is kept out of the metrics and of the state that a checkpoint restores, where wall time would make equal runs differ.
    """

    def __init__(self):
        self.before = Cost()
        self._images, self._rows = 0, {False: 0, True: 0}
        self._seconds, self._processor_seconds, self._since = 0.0, 0.0, None

    def watch(self, denoisers: Iterable[nn.Module]) -> None:
        """Count the rows through these from now on; not through copies of them."""
        for module in denoisers:
            # Not a forward hook: those run for gated calls as well. The gate is put around this.
            module.forward = InPlace(self._counted, module.forward)

    def _counted(self, forward, *args, **kwargs):
        if self._since is not None:
            self._rows[torch.is_grad_enabled()] += len(args[0] if args else next(iter(kwargs.values())))
        return forward(*args, **kwargs)

    def count_images(self, number: int) -> None:
        """This process has samples to generate."""
        if self._since is not None:
            self._images += number

    @contextmanager
    def running(self) -> Iterator[None]:
        """Context: count."""
        self._since = self._now()
        try:
            yield
        finally:
            self._stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context: do not count, as while a run evaluates between two epochs."""
        was_running = self._since is not None
        self._stop()
        try:
            yield
        finally:
            self._since = self._now() if was_running else None

    @staticmethod
    def _now() -> tuple[float, float]:
        """Of the wall, and of this process's CPUs."""
        return time.perf_counter(), time.process_time()

    def _stop(self) -> None:
        wall, processor = self._elapsed()
        self._seconds, self._processor_seconds, self._since = self._seconds + wall, self._processor_seconds + processor, None

    def _elapsed(self) -> tuple[float, float]:
        return (0.0, 0.0) if self._since is None else tuple(now - then for now, then in zip(self._now(), self._since))

    def total(self) -> Cost:
        """The whole run's costs; all processes must ask together."""
        wall, processor = self._elapsed()
        counts = gather_object([(self._images, sum(self._rows.values()), self._rows[True], self._processor_seconds + processor)])
        images, rows, with_gradients, processors = (sum(column) for column in zip(*counts))
        return Cost(
            self.before.images + images,
            self.before.denoiser_evaluations + rows,
            self.before.denoiser_evaluations_with_gradients + with_gradients,
            self.before.seconds + self._seconds + wall,
            self.before.processor_seconds + processors,
        )

    def resume(self, spent: Cost | None) -> None:
        """Go on from what has been spent before, if anything."""
        self.before = spent or Cost()
        self._images, self._rows, self._seconds, self._processor_seconds = 0, {False: 0, True: 0}, 0.0, 0.0
