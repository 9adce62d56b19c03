"""Pairs of a preference flow."""

import pytest

from diffusers_align.training.offline import flow_pairs


def test_pairs_split_by_prompt_and_both_sides_have_some():
    pairs = [{"prompt": f"p{i % 5}", "n": i} for i in range(20)]
    kept, held_out = flow_pairs.split_by_prompt(pairs, 0.4, 0)
    assert len({row["prompt"] for row in held_out}) == 2 and not {row["prompt"] for row in kept} & {row["prompt"] for row in held_out}
    assert len(kept) + len(held_out) == 20 and flow_pairs.split_by_prompt(pairs, 0.0, 0) == (pairs, [])
    assert len({tuple(sorted({row["prompt"] for row in flow_pairs.split_by_prompt(pairs, 0.4, seed)[1]})) for seed in range(5)}) > 1
    with pytest.raises(ValueError, match="Of 5 prompts, 5 would be held out"):
        flow_pairs.split_by_prompt(pairs, 1.0, 0)


def test_a_tie_is_no_win_and_a_soft_label_is_said(capsys):
    rows = [{"prompt": "a", "label_0": label, "weight": 1.0} for label in (1.0, 0.5, 0.0, 0.7, 0.5)]
    assert [row["label_0"] for row in flow_pairs.decided(rows, "data")] == [1.0, 0.0, 0.7]
    said = capsys.readouterr().out
    assert "2 of 5 pairs are ties" in said and "1 of 3 labels lie between 0 and 1" in said
    with pytest.raises(ValueError, match="all pairs are ties"):
        flow_pairs.decided([rows[1]], "data")
