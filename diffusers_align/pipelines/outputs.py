"""Outputs of stock pipelines, put together from those of batches."""

import numpy as np
import torch
from torch import Tensor


def merged(outputs: list):
    """One stock output of those of several batches: lists, arrays and tensors are put together, what there is not stays None."""
    first = outputs[0]
    if len(outputs) == 1:
        return first
    if isinstance(first, tuple):
        return tuple(_joined(values) for values in zip(*outputs))
    for name in list(first):
        first[name] = _joined([output[name] for output in outputs])
    return first


def by_scheduler(states: dict[int, Tensor]) -> list[Tensor]:
    """States (B, *D) by the number of their scheduler, (B, 0) of one that took no step.

    Raises:
        ValueError: none took a step.
    """
    if not states:
        raise ValueError("The pipeline took no step of a scheduler: num_inference_steps or strength asks for none.")
    like = next(iter(states.values()))
    return [states.get(number, like.new_zeros(len(like), 0)) for number in range(max(states) + 1)]


def _joined(values: list):
    if isinstance(values[0], Tensor):
        return torch.cat(values)
    if isinstance(values[0], np.ndarray):
        return np.concatenate(values)
    # Of one row a modular pipeline's state has a generator as such, of several a list.
    return [item for value in values for item in (value if isinstance(value, list) else [value])] if isinstance(values[0], list) else values[0]
