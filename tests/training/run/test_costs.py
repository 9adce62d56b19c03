"""What a run costs."""

import copy
import pickle

import pytest
import torch
from torch import nn

from diffusers_align.training.run.costs import Meter


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"])
def test_a_copy_of_a_watched_denoiser_is_a_copy(copied):
    module, meter = nn.Linear(2, 2), Meter()
    meter.watch([module])
    other = copied(module)
    with torch.no_grad():
        other.weight.zero_()
        other.bias.zero_()
    with meter.running():
        assert other(torch.ones(3, 2)).abs().max() == 0 and module(torch.ones(3, 2)).abs().max() > 0
    assert meter.total().denoiser_evaluations == 3, "the copy is not watched"
