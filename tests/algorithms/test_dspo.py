"""DSPO against its official code."""

import pytest
import torch
from linear_models import BETA, Model, assert_equal, official, tensor

from diffusers_align.algorithms.dspo import dspo_loss


def test_dspo_is_the_official_vector_form():
    model = Model()
    inside, *_ = official(*model.errors(), BETA)
    output, reference = model.x_w @ model.weight, model.x_w @ model.reference
    c = 0.6 * (1 - torch.sigmoid(inside))[:, None]
    expected = ((output - model.y_w) - c * (output - reference)).square().mean(1)
    actual = dspo_loss(*model.errors(), model.ref_distance(), beta=BETA, dspo_beta=0.6)
    assert_equal(actual, expected)
    assert_equal(model.gradient(actual.mean()), model.gradient(expected.mean()))


def test_dspo_at_the_reference_is_fine_tuning_on_winners():
    model = Model(at_reference=True)
    loss, winner = dspo_loss(*model.errors(), model.ref_distance(), beta=BETA, dspo_beta=0.6), model.errors()[0]
    assert_equal(loss, winner)
    assert_equal(model.gradient(loss.mean()), (1 - 0.6 / 2) * model.gradient(winner.mean()))


def test_dspo_of_the_official_sdxl_code():
    model = Model()
    doubt, distance = 1 - torch.sigmoid(official(*model.errors(), BETA)[0]), tensor(0, 0.05, 0.1, 0.2, 1, 2)
    expected = [d**2 * (k if k >= 0.1 else 1) for d, k in zip(doubt.tolist(), distance.tolist())]
    assert_equal(dspo_loss(*model.errors(), distance, beta=BETA, objective="distance"), expected)
    with pytest.raises(ValueError, match='"score" or "distance"'):
        dspo_loss(*model.errors(), distance, beta=BETA, objective="sdxl")
