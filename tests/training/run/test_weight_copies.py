"""Copies of the weights that lag behind."""

import pytest
import torch
from torch import nn

from diffusers_align.training.run.weight_copies import LaggingWeights


def test_lagging_weights():
    layer = nn.Linear(2, 1, bias=False)
    first = layer.weight.detach().clone()
    lagging = LaggingWeights(list(layer.parameters()))
    with torch.no_grad():
        layer.weight.add_(1)
    lagging.update(0.75)
    saved = lagging.state_dict()
    loss = layer.weight.square().sum()
    with pytest.raises(KeyError), lagging.applied():
        assert torch.allclose(layer.weight, first + 0.25)
        raise KeyError
    assert torch.equal(layer.weight, first + 1), "the live weights are back"
    loss.backward()
    assert torch.equal(layer.weight.grad, 2 * (first + 1)), "a graph that was built before is still theirs"
    lagging.update(0.0)
    assert torch.equal(lagging.values[0], layer.weight)
    lagging.load_state_dict(saved)
    assert torch.allclose(lagging.values[0], first + 0.25) and torch.equal(layer.weight, first + 1)
