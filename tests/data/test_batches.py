"""Batches of a data set: permutations that depend on the seed alone, and shares of two classes."""

from collections import Counter

import pytest

from diffusers_align.data import balanced_batch_of, batch_of


def test_batches_walk_through_permutations():
    steps = [batch_of(step, 4, 10, seed=0) for step in range(5)]
    flat = sum(steps, [])
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10)) and flat[:10] != flat[10:] and flat[:10] != list(range(10))
    assert batch_of(3, 4, 10, seed=0) == steps[3] != batch_of(3, 4, 10, seed=1)
    assert Counter(batch_of(0, 9, 3, seed=0)) == {0: 3, 1: 3, 2: 3}
    with pytest.raises(ValueError, match="no rows"):
        batch_of(0, 1, 0, seed=0)


@pytest.mark.parametrize("world", [2, 3, 6])
def test_the_global_batch_does_not_depend_on_the_processes(world):
    classes = range(0, 20, 3), range(1, 20, 3)
    for step in range(4):
        assert sum((batch_of(step, 6 // world, 10, 0, rank, world) for rank in range(world)), []) == batch_of(step, 6, 10, 0)
        parts = (balanced_batch_of(step, 6 // world, *classes, 0, rank, world) for rank in range(world))
        assert sum(parts, []) == balanced_batch_of(step, 6, *classes, 0)


@pytest.mark.parametrize("gamma", [0, 0.1, 0.5, 0.8, 1])
def test_balanced_batches_hold_their_share_and_see_each_row_equally_often(gamma):
    desirable, undesirable = [1, 4, 6], [0, 2, 3, 5, 7]
    rows = sum((balanced_batch_of(step, 10, desirable, undesirable, 0, gamma=gamma) for step in range(30)), [])
    counts = Counter(rows)
    assert sum(counts[row] for row in desirable) == round(gamma * 300)
    for group in (desirable, undesirable):
        assert max(counts[row] for row in group) - min(counts[row] for row in group) <= 1


def test_balanced_batches_say_what_is_missing():
    with pytest.raises(ValueError, match=r"no undesirable rows, but gamma=0.8 asks for a share of 0.2 of them. Label some, or choose gamma=1"):
        balanced_batch_of(0, 2, [0], [], 0)
    with pytest.raises(ValueError, match="no desirable rows, but gamma=0.8.*choose gamma=0"):
        balanced_batch_of(0, 2, [], [0], 0)
    with pytest.raises(ValueError, match="between 0 and 1, got 8"):
        balanced_batch_of(0, 2, [0], [1], 0, gamma=8)
    assert balanced_batch_of(0, 2, [3], [], 0, gamma=1) == [3, 3]
