"""Learning from a data set: its rows as batches of noised latents, held-out pairs, fitted rewards."""

from ...moved import as_before

__getattr__ = as_before(__name__)
