"""Pairs of a preference flow."""

import pytest

from diffusers_align.training.offline import flow_pairs


def test_pairs_split_by_prompt_and_both_sides_have_some():
    pairs = [{"prompt": f"p{i % 5}", "n": i} for i in range(20)]
    kept, held_out = flow_pairs.split_by_prompt(pairs, 0.4, 0)
    assert len({row["prompt"] for row in held_out}) == 2 and not {row["prompt"] for row in kept} & {row["prompt"] for row in held_out}
    assert len(kept) + len(held_out) == 20 and flow_pairs.split_by_prompt(pairs, 0.0, 0) == (pairs, [])
    assert {tuple(sorted({row["prompt"] for row in flow_pairs.split_by_prompt(pairs, 0.4, seed)[1]})) for seed in range(5)} != 1
    with pytest.raises(ValueError, match="Of 5 prompts, 5 would be held out"):
        flow_pairs.split_by_prompt(pairs, 1.0, 0)
