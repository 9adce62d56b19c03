"""What a report calls its prompts."""

import pytest

from diffusers_align.training.report.report import judged_on


@pytest.mark.parametrize(
    "judged, expected",
    [("ab", "held-out prompts"), ("xy", "the training prompts"), ("aaxb", "3 prompts (1 of them trained on)")],
)
def test_only_held_out_prompts_are_called_so(judged, expected):
    assert judged_on(iter(judged), {"x", "y", "z"}) == expected
