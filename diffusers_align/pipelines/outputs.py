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


def rows_of(one, other, chosen: list[bool]):
    """One stock output of two of the same B samples: of those that are `chosen` from the first, of the others from the second."""
    if isinstance(one, tuple):
        return tuple(_mixed(*values, chosen) for values in zip(one, other))
    for name in list(other):
        other[name] = _mixed(one[name], other[name], chosen)
    return other


def _mixed(one, other, chosen: list[bool]):
    has_rows = isinstance(other, list) or (isinstance(other, (Tensor, np.ndarray)) and other.ndim > 0)
    # Of one kind: a modular pipeline's state also holds its generators, one in the first and several in the second.
    if type(one) is not type(other) or not has_rows or not len(other) or len(other) % len(chosen):
        return other
    size = len(other)
    each = size // len(chosen)  # some hand out several pictures of a sample one after the other
    mixed = [(one if chosen[i // each] else other)[i] for i in range(size)]
    return mixed if isinstance(other, list) else torch.stack(mixed) if isinstance(other, Tensor) else np.stack(mixed)


def _joined(values: list):
    if isinstance(values[0], Tensor):
        return torch.cat(values)
    if isinstance(values[0], np.ndarray):
        return np.concatenate(values)
    # Of one row a modular pipeline's state has a generator as such, of several a list.
    return [item for value in values for item in (value if isinstance(value, list) else [value])] if isinstance(values[0], list) else values[0]
