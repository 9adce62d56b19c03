"""A training run: its processes and batches, its metrics and costs, whether it learns, how it ends."""

from ...moved import as_before

__getattr__ = as_before(__name__)
