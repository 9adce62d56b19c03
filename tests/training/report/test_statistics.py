"""Statistics of evaluations, by hand."""

import math

import pytest
import torch

from diffusers_align.training.online.sampling import paired_gain
from diffusers_align.training.report.statistics import diversity, in_words, mean_and_error, pairwise_cosine, pairwise_rms, wilson_interval, win_rate

NAN = float("nan")


# --- statistics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "successes, number, low, high",
    # by hand; 8 of 10 and 0 of 10 stand in the textbooks
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962), (0.5, 1, 0.0546, 0.9454)],
)
def test_wilson_interval(successes, number, low, high):
    assert wilson_interval(successes, number) == pytest.approx((low, high), abs=1e-4)


def test_wilson_interval_of_nothing_is_nan():
    assert all(math.isnan(end) for end in wilson_interval(0, 0))


def test_ties_count_half_and_nan_pairs_are_left_out():
    base = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, NAN, 0.0])
    values = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 1.0, NAN])
    result = win_rate(values, base)
    assert (result.wins, result.ties, result.losses, result.left_out) == (2, 2, 1, 2)
    assert result.rate == 3 / 5 and (result.low, result.high) == wilson_interval(3, 5)
    assert math.isnan(win_rate(torch.tensor([NAN]), torch.tensor([0.0])).rate)


def test_means_errors_and_paired_gains_by_hand():
    # deviations -1.5, -0.5, 0.5, 1.5: variance 5 / 3, error sqrt(5 / 3 / 4)
    assert mean_and_error(torch.tensor([1.0, 2.0, NAN, 3.0, 4.0])) == pytest.approx((2.5, math.sqrt(5 / 12)))
    before, after = torch.tensor([10.0, 20.0, 30.0, NAN]), torch.tensor([11.0, 22.0, 33.0, 1.0])
    assert paired_gain(before, after) == pytest.approx((2.0, 1 / math.sqrt(3)))
    single, none = mean_and_error(torch.tensor([2.0])), mean_and_error(torch.tensor([NAN]))
    assert single[0] == 2.0 and math.isnan(single[1]) and all(math.isnan(value) for value in none)


# --- diversity ---------------------------------------------------------------------------------------------------------


def test_diversity_is_the_mean_distance_within_a_prompt():
    vectors = torch.tensor([[0.0, 0.0], [3.0, 4.0], [100.0, 0.0], [100.0, 2.0], [0.0, 0.0]])
    found = diversity(vectors, ["a", "a", "b", "b", "a"], pairwise_rms)
    # a: pairs at 5, 0 and 5; b: a pair at 2; each over the root of two dimensions
    torch.testing.assert_close(found, torch.tensor([10 / 3, 2.0]) / math.sqrt(2))
    with pytest.raises(ValueError, match="one of 'b'"):
        diversity(vectors[:3], ["a", "a", "b"], pairwise_rms)


def test_cosine_distance():
    units = torch.nn.functional.normalize(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), dim=-1)
    rows, columns = torch.triu_indices(4, 4, 1)
    torch.testing.assert_close(pairwise_cosine(units), 1 - (units @ units.T)[rows, columns])


# --- costs -------------------------------------------------------------------------------------------------------------


def test_numbers_in_words():
    def words(*numbers, **form):
        return in_words(torch.tensor(numbers), **form)

    assert [words(0.375, 0.625, form="+.4f"), words(-0.5), words(NAN, NAN)] == ["+0.5000 ± 0.1250", "-0.5000", "without a score"]
    assert [words(0.375, NAN, 0.625), words(NAN, -0.5)] == ["0.5000 ± 0.1250 (1 of 3 without a score)", "-0.5000 (1 of 2 without a score)"]
