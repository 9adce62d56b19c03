"""SPO's loss and its pairs of candidates."""

import inspect
import math

import pytest
import torch
from linear_models import NAN, assert_equal, random, tensor

from diffusers_align.algorithms.d3po import CLIPS, d3po_loss
from diffusers_align.algorithms.spo import resample, spo_loss, step_pairs

# --- D3PO ------------------------------------------------------------------------------------------------------------------


def test_spo_is_d3po_with_another_beta():
    log_probs = random(4, 9)
    for clip in CLIPS:
        assert_equal(spo_loss(*log_probs, per_dim=3, clip=clip), d3po_loss(*log_probs, per_dim=3, beta=10.0, clip=clip))
    assert inspect.signature(spo_loss).parameters["clip"].default == "one_sided"
    with pytest.raises(ValueError, match="one_sided, official, none"):
        spo_loss(*log_probs, per_dim=3, clip="ppo")


# --- SPO -------------------------------------------------------------------------------------------------------------------


def test_step_pairs_are_best_and_worst_by_the_softmax_difference():
    scores = torch.cat([3 * random(50, 4), tensor(1, 1, 1, 1)[None], tensor(NAN, 2, 0, 1)[None], tensor(NAN, NAN, NAN, 5)[None], tensor(*[NAN] * 4)[None]])
    pairs = step_pairs(scores, threshold=0.3)
    for i in range(50):
        ranked = scores[i].sort(descending=True)
        two = ranked.values[[0, -1]].softmax(0)
        assert (pairs.winner[i], pairs.loser[i]) == (ranked.indices[0], ranked.indices[-1])
        assert pairs.keep[i] == (two[0] - two[1] > 0.3)
    assert 0 < pairs.keep[:50].sum() < 50 or pairs.keep[:50].all()
    assert not pairs.keep[50] and pairs.gap[50] == 0
    assert (pairs.winner[51], pairs.loser[51], pairs.keep[51]) == (1, 2, True)
    assert not pairs.keep[52:].any() and (pairs.gap[52:] == 0).all()
    with pytest.raises(ValueError, match="k >= 2"):
        step_pairs(scores[:, :1])


@pytest.mark.parametrize("threshold", [0.3, 0.4])
def test_the_threshold_in_scores(threshold):
    gap = 2 * math.atanh(threshold)
    assert step_pairs(tensor(0, gap + 1e-9)[None], threshold=threshold).keep
    assert not step_pairs(tensor(0, gap - 1e-9)[None], threshold=threshold).keep


def test_resampling_is_uniform_and_keyed_by_sample():
    def generators(seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    drawn = resample(1000, 4, generators(range(1000)))
    counts = torch.bincount(drawn, minlength=4)
    assert counts.sum() == 1000 and counts.min() > 190 and counts.max() < 310
    assert (resample(3, 4, generators([7, 500, 2])) == drawn[[7, 500, 2]]).all()
    with pytest.raises(ValueError, match="a generator each"):
        resample(2, 4, generators([0]))
