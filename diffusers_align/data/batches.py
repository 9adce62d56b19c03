"""Which rows a training step sees: pure functions of the step, the same for any number of processes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=8)
def _permutation(number: int, seed: str, cycle: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}/{cycle}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randperm(number, generator=generator)


def _at(position: int, number: int, seed: str) -> int:
    """What stands at a position of the endless row of seeded permutations of `range(number)`."""
    cycle, offset = divmod(position, number)
    return int(_permutation(number, seed, cycle)[offset])


def batch_of(step: int, batch_size: int, number: int, seed: int, rank: int = 0, world: int = 1) -> list[int]:
    """The `batch_size` rows out of `number` that process `rank` of `world` sees at a step: walks through seeded permutations.

    The processes' batches in order of rank are the global batch of batch_size * world, which does not depend on how it is divided.
    Each row is seen equally often.
    """
    if number < 1:
        raise ValueError("There are no rows to draw batches from.")
    start = (step * world + rank) * batch_size
    return [_at(position, number, str(seed)) for position in range(start, start + batch_size)]


def balanced_batch_of(
    step: int, batch_size: int, desirable: Sequence[int], undesirable: Sequence[int], seed: int, rank: int = 0, world: int = 1, *, gamma: float = 0.8
) -> list[int]:
    """As `batch_of`, with a share `gamma` of desirable rows (Diffusion-KTO, https://arxiv.org/abs/2404.04465: 0.8).

    The share holds for any stretch of the global batch to within one row, where the official weighted sampler holds it on average;
    within a class, each row is seen equally often.

    Args:
        desirable, undesirable: the numbers of the rows of each class.

    Raises:
        ValueError: gamma outside [0, 1], or a class that gamma asks for is empty.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma is the share of desirable rows, between 0 and 1, got {gamma}.")
    for name, rows, share in (("desirable", desirable, gamma), ("undesirable", undesirable, 1 - gamma)):
        if share > 0 and not len(rows):
            raise ValueError(
                f"There are no {name} rows, but gamma={gamma} asks for a share of {share:g} of them. Label some, or choose gamma={1 - round(share)}."
            )
    start, share, batch = (step * world + rank) * batch_size, Fraction(str(gamma)), []
    for position in range(start, start + batch_size):
        before = int(position * share)  # desirable rows at earlier positions
        if int((position + 1) * share) > before:
            batch.append(desirable[_at(before, len(desirable), f"{seed}/desirable")])
        else:
            batch.append(undesirable[_at(position - before, len(undesirable), f"{seed}/undesirable")])
    return batch
