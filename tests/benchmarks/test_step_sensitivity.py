"""The benchmark of the steps' sensitivity: what it found on mini-sd shows with few samples too."""

from benchmarks.step_sensitivity import measure


def test_the_last_step_rules_the_update_unless_it_has_no_noise():
    """Of six on mini-sd: its part of the gradient, and its move."""
    *others, last = measure("mini-sd", 6, 4, 1e-3, None)
    assert [row.k for row in others] == [0, 1, 2, 3, 4] and last.k == 5
    for name in ("sensitivity", "gradient", "move"):
        assert getattr(last, name) > 5 * max(getattr(row, name) for row in others)
    without = measure("mini-sd", 6, 4, 1e-3, (0, 5))
    assert [row.k for row in without] == [0, 1, 2, 3, 4] and [row.std for row in without] == [row.std for row in others]
