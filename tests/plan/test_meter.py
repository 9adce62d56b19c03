"""A piece of work whose bytes and operations are known."""

import torch
from torch import nn

from diffusers_align.plan.meter import Meter


def test_bytes_and_operations_of_a_linear_layer_are_counted():
    layer, x, meter = nn.Linear(64, 32, bias=False), torch.zeros(16, 64), Meter()
    with meter.measure() as work:
        y = layer(x).relu()
        y.sum().backward()
    assert work.flops == 2 * 2 * 16 * 64 * 32  # forward, and the weight's gradient
    assert work.kept == 16 * 32 * 4  # the ReLU's result; the input and the weight were there before
    assert work.left == 32 * 64 * 4 + 16 * 32 * 4  # the gradient, and the result
    assert work.peak >= work.left


def test_what_is_freed_does_not_count_and_views_count_once():
    meter, x = Meter(), torch.zeros(1000)
    with meter.measure() as work:
        for _ in range(5):
            y = x + 1
            y = y.view(10, 100)
    assert work.peak == 2 * 4000 and work.left == 4000


def test_a_part_that_is_known_is_added_without_being_walked():
    meter, x = Meter(), torch.zeros(1000)
    with meter.measure() as work:
        held = x + 1
        with meter.part() as part:
            (x + 2).sum()
        assert part.peak == 4004 and work.peak == 8004
        more = x + 3
        meter.again(part)
    assert work.peak == 8000 + 4004 and held.shape == more.shape


def test_nothing_is_counted_without_a_measurement():
    meter = Meter()
    with meter.watch():
        torch.zeros(10) + 1
    assert meter.work is None
