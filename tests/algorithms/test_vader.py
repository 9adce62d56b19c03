"""VADER's steps and frames."""

import pytest
from velocity_chain import drawn

from diffusers_align.algorithms import vader


def test_vaders_steps_and_frames():
    assert vader.grad_steps(50) == [49]
    assert vader.grad_steps(50, mode="specific") == list(range(15, 50))
    assert vader.grad_steps(10, mode="specific") == list(range(3, 10))
    assert {min(steps) for steps in drawn(lambda g: vader.grad_steps(4, g, mode="random"), 200)} == set(range(4))
    assert {tuple(f) for f in drawn(lambda g: vader.frame_indices(3, g), 100)} == {(0,), (1,), (2,)}
    assert vader.frame_indices(9, mode="ends") == [0, 4, 8] and vader.frame_indices(1, mode="ends") == [0]
    assert vader.frame_indices(5, mode="alternate") == [0, 2, 4] and vader.frame_indices(3, mode="all") == [0, 1, 2]
    for choose in (vader.grad_steps, vader.frame_indices):
        with pytest.raises(ValueError, match="mode"):
            choose(5, mode="never")
