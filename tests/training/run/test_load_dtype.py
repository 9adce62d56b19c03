"""Pipelines are loaded in the precision that is asked for, with every version of diffusers."""

from argparse import Namespace

import diffusers
import pytest
import torch

from diffusers_align.training.run.load_dtype import in_dtype
from diffusers_align.training.run.model_loading import load_pipeline

NAMES = {"0.38.0": "torch_dtype", "0.39.0": "torch_dtype", "0.40.0.dev0": "dtype", "0.42.1": "dtype", "1.0.0": "dtype"}


@pytest.mark.parametrize("precision, dtype", [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_a_pipeline_has_the_precision_of_the_flag(precision, dtype):
    pipeline = load_pipeline(Namespace(pretrained_model_name_or_path="mini-sd", mixed_precision=precision, revision=None, variant=None))
    assert (pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype) == (dtype,) * 3


@pytest.mark.parametrize("version", NAMES)
def test_the_keyword_is_the_versions_own(version, monkeypatch):
    monkeypatch.setattr(diffusers, "__version__", version)
    assert in_dtype(torch.bfloat16) == {NAMES[version]: torch.bfloat16}
