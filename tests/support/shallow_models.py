"""The embedded pipelines with fewer blocks, of random weights: a third of the time for whatever walks and counts each operation."""

from unittest import mock

import pytest

from benchmarks import plan as benchmark

SHALLOW = {
    "mini-sd3": {"num_layers": 2},
    "mini-sd": {"block_out_channels": (48,), "down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)},
}


@pytest.fixture(scope="module")
def shallow(tmp_path_factory):
    """Their folders, by name."""
    with mock.patch.dict(benchmark.WIDER, SHALLOW):
        return {name: str(benchmark.larger(name, tmp_path_factory.mktemp("shallow") / name)) for name in SHALLOW}
