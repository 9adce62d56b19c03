"""Models behind doors: real outside, fake inside."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffusers_align.plan.fakes import FakeModels
from diffusers_align.plan.meter import Meter


class Block(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.norm, self.inside, self.outside = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x, scale=1.0):
        return {"sample": x + scale * self.outside(F.gelu(self.inside(self.norm(x))))}


def fake_and_real(**options):
    meter = Meter()
    fakes = FakeModels(meter, **options)
    with fakes.making():
        fake = fakes.convertible(Block())
    fakes.put_behind_doors("block", fake)
    return fakes, fake, Block(), meter


@pytest.mark.parametrize("recompute", [False, True])
def test_a_gradient_step_takes_what_the_real_one_takes(recompute):
    _, fake, block, meter = fake_and_real(as_on_gpu=False)
    works = []
    for module in (fake, block):
        x = torch.randn(8, 32, requires_grad=True)
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        with meter.measure() as work:
            output = checkpoint(module, x, use_reentrant=False) if recompute else module(x)
            (output["sample"] * 2).sum().backward()
        works.append(work)
        assert x.grad.shape == x.shape and type(x.grad) is torch.Tensor
    assert works[0].flops == works[1].flops > 0
    assert works[0].kept == pytest.approx(works[1].kept, rel=0.05)
    assert works[0].peak == pytest.approx(works[1].peak, rel=0.05)


def test_answers_are_real_zeros_in_the_models_own_form():
    _, fake, _, _ = fake_and_real()
    with torch.no_grad():
        output = fake(torch.randn(8, 32), scale=2.0)
    assert type(output["sample"]) is torch.Tensor and output["sample"].shape == (8, 32) and not output["sample"].any()


def test_an_equal_call_without_gradient_is_not_walked_again_and_counts_again():
    fakes, fake, _, meter = fake_and_real()
    with torch.no_grad(), meter.measure() as once:
        fake(torch.randn(8, 32))
    with torch.no_grad(), meter.measure() as twice:
        fake(torch.randn(8, 32))
        fake(torch.randn(8, 32))
    assert len(fakes._known) == 1 and twice.flops == 2 * once.flops > 0
    with torch.no_grad(), meter.measure():
        fake(torch.randn(8, 32), scale=2.0)
    assert len(fakes._known) == 2


def test_weights_can_be_cast_also_later():
    _, fake, _, _ = fake_and_real()
    assert fake.to(torch.bfloat16).inside.weight.dtype == torch.bfloat16
    assert all(isinstance(parameter, nn.Parameter) for parameter in fake.parameters())


@pytest.mark.parametrize("recompute", [False, True])
def test_a_gpus_autocast_normalises_in_float32(recompute):
    fakes, fake, _, meter = fake_and_real()
    other = FakeModels(meter, as_on_gpu=False)
    with other.making():
        as_on_cpu = other.convertible(Block())
    other.put_behind_doors("block", as_on_cpu)
    kept = []
    for models, module in ((fakes, fake), (other, as_on_cpu)):
        module.to(torch.bfloat16)
        block = module.norm.forward
        if recompute:
            module.norm.forward = lambda x, models=models, block=block: models.checkpoint(block, x)
        with meter.measure() as work, torch.autocast("cpu", torch.bfloat16):
            module(torch.randn(8, 32, dtype=torch.bfloat16, requires_grad=True))["sample"].float().sum().backward()
        kept.append(work.kept)
    assert kept[0] >= kept[1] + (0 if recompute else 8 * 32 * 4)
