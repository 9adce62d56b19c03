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


def _joined(values: list):
    if isinstance(values[0], Tensor):
        return torch.cat(values)
    if isinstance(values[0], np.ndarray):
        return np.concatenate(values)
    # Of one row a modular pipeline's state has a generator as such, of several a list.
    return [item for value in values for item in (value if isinstance(value, list) else [value])] if isinstance(values[0], list) else values[0]
