"""SRPO against its official formulas."""

import pytest
import torch
from torch import nn
from velocity_chain import EXACT, noise

from diffusers_align.algorithms import srpo


@pytest.mark.parametrize("sigma, sigma_next", [(0.9, 0.7), (0.5, 0.0), (0.4, 0.6)])
def test_the_recovered_sample_is_the_official_formula(sigma, sigma_next):
    x0, eps, velocity = noise(1), noise(2), noise(3)
    x = (1 - sigma) * x0 + sigma * eps
    expected = (x + (sigma_next - sigma) * velocity - sigma_next * eps) / (1 - sigma_next)
    torch.testing.assert_close(srpo.recovered_sample(x0, eps, velocity, sigma=sigma, sigma_next=sigma_next), expected, **EXACT)
    perfect = srpo.recovered_sample(x0, eps, eps - x0, sigma=sigma, sigma_next=sigma_next)
    torch.testing.assert_close(perfect, x0, **EXACT)


def test_nothing_is_recovered_from_pure_noise():
    with pytest.raises(ValueError, match="pure noise"):
        srpo.recovered_sample(noise(), noise(), noise(), sigma=0.9, sigma_next=1.0)


def test_the_two_branches_move_the_model_alike():
    x0, eps = noise(1), noise(2)
    gradients = []
    for sigma_next, sign in ((0.4, 1.0), (0.6, -1.0)):
        velocity = noise(3).requires_grad_()
        recovered = srpo.recovered_sample(x0, eps, velocity, sigma=0.5, sigma_next=sigma_next)
        gradients.append(torch.autograd.grad((sign * recovered.sum(1)).sum(), velocity)[0])
    assert (gradients[0] * gradients[1] > 0).all()


def test_semantic_relative_preference():
    """Of cosines it is the paper's product with the difference of the two texts' embeddings."""
    image, wanted, unwanted = (nn.functional.normalize(noise(seed), dim=1) for seed in (1, 2, 3))
    expected = (image * (1.2 * wanted - unwanted)).sum(1)
    cosines = (image * wanted).sum(1), (image * unwanted).sum(1)
    torch.testing.assert_close(srpo.semantic_relative_preference(*cosines, 0.2), expected, **EXACT)
    assert srpo.semantic_relative_preference(cosines[0], cosines[0], 0.0).abs().max() == 0
    assert srpo.srpo_loss(torch.tensor([0.2, 0.9]), torch.tensor([0.6, 0.1])).tolist() == pytest.approx([0.6, 0.6])


# (noise level, discount) of the official code, run at its levels: entries 5 to 25 of a schedule of 50 steps with shift 3.
OFFICIAL_DISCOUNTS = {False: [(0.964, 0.244), (0.878, 0.176), (0.769, 0.108)], True: [(0.943, 0.036), (0.834, 0.183), (0.750, 0.297)]}


@pytest.mark.parametrize("inversion", [False, True])
def test_srpos_discounts_belong_to_the_official_noise_levels(inversion):
    """Large at much noise, and small there for the inversion. Its step begins in between the levels, hence the tolerance."""
    found = srpo.discounts(21, inversion=inversion)
    assert found[[0, -1]].tolist() == pytest.approx([0.01, 0.3] if inversion else [0.25, 0.1])
    for sigma, discount in OFFICIAL_DISCOUNTS[inversion]:
        place = 50 * (1 - sigma / (3 - 2 * sigma)) - 5  # of the shifted level among the 21
        assert float(found[round(place)]) == pytest.approx(discount, abs=0.03 if inversion else 0.01)
