"""What a test draws depends on its name alone: a failure comes back when the test runs alone."""

import random
from zlib import crc32

import numpy as np
import pytest
import torch


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def drawn_after(name: str) -> tuple[float, float, float]:
    number = crc32(name.encode())
    return random.Random(number).random(), float(np.random.RandomState(number).rand()), float(torch.rand((), generator=torch.Generator().manual_seed(number)))


@pytest.fixture(scope="module")
def weights():
    return draws()


@pytest.fixture
def data():
    return draws()


def test_fixtures_and_tests_draw_by_their_names(weights, data, request):
    assert draws() == drawn_after(request.node.nodeid)
    assert weights == drawn_after("weights") and data == drawn_after("data")
