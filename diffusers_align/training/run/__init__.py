"""A training run: its processes and batches, its metrics and costs, whether it learns, how it ends."""
