"""Pipelines from configs alone."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from diffusers_align import embedded
from diffusers_align.plan.fakes import FakeModels
from diffusers_align.plan.meter import Meter
from diffusers_align.plan.models import build, configs_of, shipped
from diffusers_align.plan.planner import component_of
from diffusers_align.training.run.model_loading import load_pipeline

# Millions of parameters, as the models' cards and papers have them.
PARAMETERS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": {"unet": 859.5, "vae": 83.7, "text_encoder": 123.1, "safety_checker": 304.0},
    "stabilityai/stable-diffusion-xl-base-1.0": {"unet": 2567.5, "vae": 83.7, "text_encoder": 123.1, "text_encoder_2": 694.7},
    "stabilityai/stable-diffusion-3.5-medium": {"transformer": 2243.2, "vae": 83.8, "text_encoder_2": 694.7, "text_encoder_3": 4762.3},
    "black-forest-labs/FLUX.1-dev": {"transformer": 11901.4, "vae": 83.8, "text_encoder": 123.1, "text_encoder_2": 4762.3},
    "Qwen/Qwen-Image": {"transformer": 20430.4, "vae": 126.9, "text_encoder": 8292.2},
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": {"transformer": 1419.0, "vae": 126.9, "text_encoder": 5680.9},
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": {"transformer": 14288.5, "vae": 126.9, "text_encoder": 5680.9},
}


def test_every_shipped_model_is_looked_at():
    assert set(shipped()) == set(PARAMETERS)


@pytest.mark.slow
@pytest.mark.parametrize("name", PARAMETERS)
def test_shipped_configs_are_models_of_the_known_sizes(name):
    pipeline = build(FakeModels(Meter()), configs_of(name), torch.bfloat16)
    for part, millions in PARAMETERS[name].items():
        assert component_of(getattr(pipeline, part)).parameters / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize("name", ["mini-sd", "mini-sd3"])
def test_a_folder_of_configs_is_the_pipeline_without_weights(name, tmp_path):
    shutil.copytree(embedded.path(name), tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors"))
    assert not list((tmp_path / "copy").rglob("*.safetensors"))
    pipeline = build(FakeModels(Meter()), configs_of(name, tmp_path / "copy"), torch.float32, tmp_path / "copy")

    class Flags:
        pretrained_model_name_or_path, mixed_precision, revision, variant = name, "no", None, None

    real = load_pipeline(Flags)
    assert type(pipeline) is type(real)
    for part, module in real.components.items():
        if hasattr(module, "parameters"):
            assert component_of(getattr(pipeline, part)) == component_of(module)


def test_a_model_without_configs_says_how_to_get_them():
    with pytest.raises(ValueError, match=r"no configs of 'someone/else'.*hf download someone/else --include '\*\.json'.*FLUX\.1-dev"):
        configs_of("someone/else")


def test_a_part_without_config_is_named(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", "vae": ["diffusers", "AutoencoderKL"]}))
    with pytest.raises(ValueError, match="vae has none of config.json"):
        configs_of("here", Path(tmp_path))


def test_a_class_that_is_not_installed_is_named():
    with pytest.raises(ValueError, match="The vae is a NoSuchModel of diffusers"):
        build(
            FakeModels(Meter()), {"model_index.json": {"_class_name": "StableDiffusionPipeline", "vae": ["diffusers", "NoSuchModel"]}, "vae": {}}, torch.float32
        )
