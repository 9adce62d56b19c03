"""What is looked at, in the order in which it is: a module for each subject."""

from __future__ import annotations

from ..column import Column
from . import evaluation, inference, pixels, sampling, training, weights

COLUMNS: tuple[Column, ...] = (
    *sampling.COLUMNS,
    *evaluation.COLUMNS,
    *pixels.COLUMNS,
    *weights.COLUMNS,
    *inference.COLUMNS,
    *training.COLUMNS,
)
