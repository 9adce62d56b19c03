"""The pipeline as its users have it: with the solver that it came with, in the place of the policy's SDE twin."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..condition import Condition
from ..schedulers.scheduling_utils import SDESchedulerMixin
from .driver import Driver
from .outcome import Outcome, images_of, outcome


@contextmanager
def stock_solver(driver: Driver) -> Iterator[None]:
    """Within, the driver walks a fresh copy of the scheduler that the pipeline came with, in the place of its SDE twin.

    A pipeline that came with an SDE scheduler walks that one's deterministic steps.
    """
    twins, driver.schedulers = driver.schedulers, copy.deepcopy(driver.stock_schedulers)
    for solver in driver.schedulers.values():
        if isinstance(solver, SDESchedulerMixin):
            solver.deterministic = True
    try:
        yield
    finally:
        driver.schedulers = twins


def stock_images(driver: Driver, condition: Condition) -> Tensor:
    """What the pipeline's own call returns for this condition: images (B, 3, H, W) or videos (B, F, 3, H, W) in [0, 1], or sounds (B, C, T) in [-1, 1].

    Raises:
        ValueError: the condition has no seeds, so nobody could draw these images again.
    """
    return images_of(_stock_output(driver, condition))


def stock_outcome(driver: Driver, condition: Condition) -> Outcome:
    """`stock_images` with the sound of videos, and its sampling rate.

    Raises:
        ValueError: the condition has no seeds; there is sound, and nothing says at which rate it is sampled.
    """
    return outcome(driver.pipeline, _stock_output(driver, condition))


@torch.no_grad()
def _stock_output(driver: Driver, condition: Condition) -> Any:
    if condition.seeds is None:
        raise ValueError("Images for a comparison need seeds: give condition(prompts, seeds=[...]) one for each prompt.")
    with stock_solver(driver), driver.noise(condition, deterministic=True):
        return driver.drive(condition, lambda step: None, output_type="pt")
