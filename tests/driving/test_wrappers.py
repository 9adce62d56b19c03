"""Wrappers around a denoiser: taken off and put back."""

import pytest
from lora_tools import Sharded, compiled
from tiny_pipelines import FAMILIES
from torch import nn

from diffusers_align.driving.denoisers import denoisers
from diffusers_align.driving.wrappers import bare, unwrapped


def test_parallel_wrappers_are_taken_off_and_put_back():
    inner = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    assert unwrapped(nn.DataParallel(compiled(inner))) is inner
    wrapped = inner[1] = Sharded(compiled(inner[1]))
    with bare(nn.DataParallel(inner)) as module:
        assert module is inner and [name for name, _ in module.named_parameters()] == ["0.weight", "0.bias", "1.0.weight", "1.0.bias"]
    assert inner[1] is wrapped
    with pytest.raises(KeyError), bare(inner):
        raise KeyError
    assert inner[1] is wrapped


def test_a_pipeline_whose_denoiser_has_another_name_may_be_compiled_too():
    class Prior(FAMILIES["sd3"].build().transformer.__class__):
        pass

    class Pipeline:
        components = {"prior": compiled(FAMILIES["sd3"].build().transformer), "vae": FAMILIES["sd3"].build().vae}

    assert list(denoisers(Pipeline)) == ["prior"]
