"""One thread per process: small models lose more to threads that wait for each other than they gain. And each test draws its own numbers."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import random  # noqa: E402
from collections import Counter  # noqa: E402
from zlib import crc32  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


def seed(name: str) -> None:
    """Random weights and data of a test are the same whatever ran before it, in every process."""
    number = crc32(name.encode())
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def pytest_fixture_setup(fixturedef):
    seed(fixturedef.argname)


def pytest_runtest_call(item):
    seed(item.nodeid)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Files with the most slow tests come first, then whole trainings before formulas: a long file at the end would leave the other worker idle."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (slow[item.path], item.path), reverse=True)
