"""One kind of preferences from another: pairs, rankings, scores, likes; ties and weights."""

import pytest
from preference_rows import GREEN, RED, G, R, pair, shown, write

from diffusers_align.data import LazyImage, load_preferences
from diffusers_align.data.conversions import (
    CONVERSIONS,
    apply_ties,
    pairs_to_binary,
    ranked_to_pairs,
    scored_to_binary,
    scored_to_pairs,
    scored_to_ranked,
    weight_by_prompt,
    winners,
)

# columns


def test_a_kind_asked_for_goes_before_conversions_and_captions_come_last(folder):
    both = write(folder / "both.jsonl", [{"prompt": "p", "image": R, "label": False, "reward": 1}, {"prompt": "p", "image": G, "label": True, "reward": 0}])
    assert [load_preferences(both, kind)[1].schema for kind in ("binary", "scored", "captioned")] == ["binary rows", "scored rows", "binary rows"]
    assert [shown(row) for row in load_preferences(both, "captioned")[0]] == [("p", GREEN)]
    ranked = write(folder / "ranked.jsonl", [{"prompt_id": 1, "prompt": "p", "image": R, "rank": 1, "label": False}])
    assert load_preferences(ranked, "binary")[1].schema == "binary rows"


@pytest.mark.parametrize("found, wanted", CONVERSIONS)
def test_sets_of_another_kind_are_converted_and_the_report_says_how(folder, found, wanted):
    rows = {
        "ranked": [{"prompt": "p", "images": [R, G], "ranks": [2, 1]}],
        "scored": [{"prompt": "p", "image": R, "reward": 0}, {"prompt": "p", "image": G, "reward": 1}],
        "pair": [pair(label=0)],
        "binary": [{"prompt": "p", "image": R, "label": False}, {"prompt": "p", "image": G, "label": True}],
    }
    expected = {
        "pair": [("p", GREEN, RED, 1.0, 1.0)],
        "binary": [("p", RED, False), ("p", GREEN, True)],
        "captioned": [("p", GREEN)],
        "ranked": [("p", [RED, GREEN], [2, 1])],
    }
    loaded, report = load_preferences(write(folder / "data.jsonl", rows[found]), wanted)
    assert sorted(map(shown, loaded), key=str) == sorted(expected[wanted], key=str)
    assert f"Converted: {CONVERSIONS[found, wanted][1]}." in str(report)


# ties


@pytest.mark.parametrize("policy, labels, fate", [("drop", [1], "dropped"), ("soft", [1, 0.5], "label 0.5"), ("keep", [1, 1, 0], "both directions at half")])
def test_ties_are_never_wins(folder, policy, labels, fate):
    loaded, report = load_preferences(write(folder / "data.jsonl", [pair(), pair(label=0.5)]), "pair", ties=policy)
    assert [row["label_0"] for row in loaded] == labels and sum(row["weight"] for row in loaded) == (1 if policy == "drop" else 2)
    assert report.ties == 1 and "1 ties" in str(report) and fate in str(report)


def test_soft_labels_are_no_ties(folder):
    loaded, report = load_preferences(write(folder / "data.jsonl", [pair(label=0.51)]), "pair")
    assert loaded[0]["label_0"] == 0.51 and report.ties == 0


# conversions


def images(*names):
    return [LazyImage(b"", uid=name) for name in names]


def names(rows):
    return [tuple(value.uid if isinstance(value, LazyImage) else value for value in row.values()) for row in rows]


def test_ranked_to_pairs():
    pairs = ranked_to_pairs(
        [{"prompt": "p", "images": images("a", "b", "c"), "ranks": [2, 1, 2]}, {"prompt": "q", "images": images("d", "e"), "ranks": [1, 2]}]
    )
    assert names(pairs) == [("p", "b", "a", 1, 1 / 3), ("p", "b", "c", 1, 1 / 3), ("p", "a", "c", 0.5, 1 / 3), ("q", "d", "e", 1, 1)]


def scored(**rewards):
    return [{"prompt": name[0], "image": LazyImage(b"", uid=name), "reward": reward} for name, reward in rewards.items()]


def test_scored_to_pairs():
    rows = scored(p1=0.1, p2=0.9, p3=0.5, q1=1.0, q2=1.0, r1=3.0)
    assert names(scored_to_pairs(rows)) == [("p", "p2", "p1", 1, 1)]
    assert names(scored_to_pairs(rows, "all")) == [("p", "p2", "p3", 1, 1 / 3), ("p", "p2", "p1", 1, 1 / 3), ("p", "p3", "p1", 1, 1 / 3)]
    assert names(scored_to_pairs(rows, "all", min_margin=0.6)) == [("p", "p2", "p1", 1, 1)]
    with pytest.raises(ValueError, match="how must be 'best_worst' or 'all', got 'some'"):
        scored_to_pairs(rows, "some")


def test_scored_to_ranked_and_binary():
    rows = scored(p1=0.1, p2=0.9, p3=0.9, q1=1.0)
    ranked = scored_to_ranked(rows)
    assert [(row["prompt"], row["ranks"]) for row in ranked] == [("p", [3, 1, 1])]
    assert [row["label"] for row in scored_to_binary(rows, threshold=0.9)] == [False, True, True, True]
    assert [row["label"] for row in scored_to_binary(scored(a=4, b=1, c=3, d=2, e=5), quantile=0.8)] == [False, False, False, False, True]
    for options in ({}, {"threshold": 0, "quantile": 0.5}):
        with pytest.raises(ValueError, match="either threshold or quantile"):
            scored_to_binary(rows, **options)


@pytest.mark.parametrize("mixed, b", [("desirable", [("p", "b", True)]), ("undesirable", [("p", "b", False)]), ("drop", [])])
def test_pairs_to_binary(mixed, b):
    win, lose, tie, soft = images("a", "b"), images("b", "c"), images("d", "c"), images("e", "f")
    pairs = [dict(prompt="p", image_0=i, image_1=j, label_0=label, weight=1) for (i, j), label in ((win, 1.0), (lose, 1.0), (tie, 0.5), (soft, 0.3))]
    expected = [("p", "a", True), *b, ("p", "c", False), ("p", "e", False), ("p", "f", True)]
    assert names(pairs_to_binary(pairs, mixed)) == expected
    if mixed == "desirable":
        assert names(winners(pairs)) == [("p", "a"), ("p", "b"), ("p", "f")]


def test_rows_that_are_written_by_hand_hold_paths_and_no_weights():
    rows = [{"prompt": "p", "image": name, "reward": reward} for name, reward in (("a.png", 0.1), ("b.png", 0.5), ("c.png", 0.9))]
    pairs = scored_to_pairs(rows, "all")
    assert [(row["image"], row["label"]) for row in pairs_to_binary(pairs, "drop")] == [("c.png", True), ("a.png", False)]
    bare = [{name: value for name, value in row.items() if name != "weight"} for row in pairs]
    assert [row["weight"] for row in weight_by_prompt(bare)] == pytest.approx([1 / 3] * 3)
    assert [row["weight"] for row in apply_ties([{**bare[0], "label_0": 0.5}], "keep")[0]] == [0.5, 0.5]


def test_unknown_policies():
    with pytest.raises(ValueError, match="mixed must be"):
        pairs_to_binary([], "both")
    with pytest.raises(ValueError, match="ties must be"):
        apply_ties([], "win")


def test_one_image_under_two_prompts_is_judged_under_each():
    a, b = images("a", "b")
    pairs = [dict(prompt=p, image_0=a, image_1=b, label_0=label, weight=1) for p, label in (("p", 1.0), ("q", 0.0))]
    assert names(pairs_to_binary(pairs)) == [("p", "a", True), ("p", "b", False), ("q", "a", False), ("q", "b", True)]


def test_weights_by_prompt(folder):
    rows = [pair("p"), pair("p", weight=3), pair("q"), pair("r", weight=0)]
    assert [row["weight"] for row in weight_by_prompt([{"weight": 1, **row} for row in rows])] == [0.25, 0.75, 1, 0]
    loaded, _ = load_preferences(write(folder / "data.jsonl", rows), "pair", weighting="prompt")
    assert [row["weight"] for row in loaded] == [0.25, 0.75, 1, 0]
