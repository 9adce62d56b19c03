"""Muon on weights of any shape."""

import pytest
import torch
from torch import nn

from diffusers_align.embedded.making.muon import AdamW, Muon, is_inner, split

needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")


@needs_muon
def test_a_convolution_is_stepped_as_the_matrix_of_its_flat_kernels():
    torch.manual_seed(0)
    conv, gradient = nn.Parameter(torch.randn(8, 4, 3, 3)), torch.randn(3, 8, 4, 3, 3)
    matrix = nn.Parameter(conv.detach().reshape(8, 36).clone())
    ours, theirs = Muon([conv], 0.02), torch.optim.Muon([matrix], 0.02, weight_decay=0.01, momentum=0.95, adjust_lr_fn="original")
    before = conv.detach().clone()
    for part in gradient:
        conv.grad, matrix.grad = part.clone(), part.reshape(8, 36).clone()
        ours.step()
        theirs.step()
    assert torch.equal(conv.detach().reshape(8, 36), matrix.detach())
    assert not torch.equal(conv.detach(), before)


@needs_muon
def test_an_update_moves_a_matrix_alike_in_all_directions():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(16, 2, 3, 3))
    muon = Muon([weight], 0.1, weight_decay=0.0)
    weight.grad = torch.randn(16, 2, 3, 3) * torch.logspace(-3, 3, 16).view(-1, 1, 1, 1)
    muon.step()
    lengths = torch.linalg.svdvals(weight.detach().flatten(1)) / 0.1
    assert lengths.max() < 1.3 and (lengths > 0.5).sum() >= 6, lengths


@needs_muon
def test_weights_without_a_gradient_stay_and_the_rate_can_change():
    first, second = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    muon = Muon([first, second], 0.1)
    first.grad = torch.eye(4)
    muon.set_rate(0.0)
    muon.step()
    assert torch.equal(first.detach(), torch.ones(4, 4))
    muon.set_rate(0.1)
    muon.step()
    assert not torch.equal(first.detach(), torch.ones(4, 4)) and torch.equal(second.detach(), torch.ones(4, 4))


@needs_muon
def test_what_muon_cannot_take_is_refused():
    with pytest.raises(ValueError, match="two dimensions or more"):
        Muon([nn.Parameter(torch.zeros(3))], 0.1)
    with pytest.raises(ValueError, match="contiguous"):
        Muon([nn.Parameter(torch.zeros(4, 4, 3, 3).to(memory_format=torch.channels_last))], 0.1)


def test_a_torch_without_muon_is_told_what_to_do(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(RuntimeError, match="install torch 2.9 or newer"):
        Muon([nn.Parameter(torch.zeros(3, 3))], 0.1)


def test_each_weight_has_one_optimizer():
    net = nn.ModuleDict({"down_blocks": nn.ModuleList([nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4))]), "conv_out": nn.Conv2d(4, 2, 3)})
    inner, rest = split([net])
    assert [tuple(weight.shape) for weight in inner] == [(4, 2, 3, 3)]
    assert len(inner) + len(rest) == len(list(net.parameters()))
    assert is_inner("text_model.encoder.layers.0.mlp.fc1.weight", torch.zeros(2, 2))
    assert not is_inner("text_model.embeddings.token_embedding.weight", torch.zeros(2, 2))
    assert not is_inner("layers.0.norm1.weight", torch.zeros(2))


def test_adamw_is_torchs_own():
    torch.manual_seed(0)
    weight, gradient = nn.Parameter(torch.randn(5)), torch.randn(5)
    other = nn.Parameter(weight.detach().clone())
    ours, theirs = AdamW([weight], 0.1), torch.optim.AdamW([other], 0.05, betas=(0.9, 0.99), weight_decay=0.01)
    weight.grad, other.grad = gradient.clone(), gradient.clone()
    ours.set_rate(0.05)
    ours.step()
    theirs.step()
    torch.testing.assert_close(weight, other)
