"""MixGRPO: where its window lies."""

from collections import Counter

import numpy as np
import pytest

from diffusers_align.algorithms.mix_grpo import window_at


def test_the_progressive_window_slides_and_rolls_back():
    windows = [window_at(i, size=4, first=0, end=8, interval=3) for i in range(16)]
    assert windows[:15] == [(s, s + 4) for s in range(5) for _ in range(3)]
    assert windows[15] == (0, 4)
    assert window_at(3, size=2, first=1, end=8, interval=3, stride=2) == (3, 5)


def test_the_published_schedule_stays_shorter_behind_the_threshold():
    total = sum(int(np.ceil(25 * np.exp(-0.1 * max(0, p - 13)))) for p in range(22))
    one_round = Counter(window_at(i, size=4, first=0, end=25, strategy="exp_decay")[0] for i in range(total))
    assert [one_round[p] for p in (13, 14, 15, 18, 20, 21)] == [25, 23, 21, 16, 13, 12]
    assert window_at(total, size=4, first=0, end=25, strategy="exp_decay") == (0, 4)


def test_random_windows_depend_on_seed_and_iteration_alone_and_visit_every_place():
    draw = [window_at(i, size=2, first=1, end=5, strategy="random", seed=3) for i in range(200)]
    assert draw == [window_at(i, size=2, first=1, end=5, strategy="random", seed=3) for i in range(200)]
    assert set(draw) == {(1, 3), (2, 4), (3, 5)}
    assert draw != [window_at(i, size=2, first=1, end=5, strategy="random", seed=4) for i in range(200)]


def test_windows_without_room_or_strategy():
    with pytest.raises(ValueError, match="no room for a window of 4"):
        window_at(0, size=4, first=2, end=5)
    with pytest.raises(ValueError, match="Unknown strategy 'best'"):
        window_at(0, size=1, first=0, end=5, strategy="best")
