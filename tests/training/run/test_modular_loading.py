"""Modular pipelines by name: which folders hold one, what is loaded of it, and what its call takes before it is."""

import json
import shutil
from argparse import Namespace

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3ModularPipeline
from modular_pipelines import modular_of

from diffusers_align import embedded
from diffusers_align.files.paths import folder
from diffusers_align.training.run.model_loading import load_pipeline
from diffusers_align.training.run.modular_loading import INDEX, is_modular, modular_parameters


def load(name, mixed_precision="no"):
    return load_pipeline(Namespace(pretrained_model_name_or_path=str(name), mixed_precision=mixed_precision, revision=None, variant=None))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """mini-sd3 as a modular folder."""
    path = tmp_path_factory.mktemp("modular") / "mini"
    modular_of(DiffusionPipeline.from_pretrained(embedded.path("mini-sd3")), "StableDiffusion3").save_pretrained(str(path), overwrite_modular_index=True)
    return path


def test_a_folder_is_modular_where_it_has_that_index_alone(saved, tmp_path):
    assert is_modular(str(saved)) and not is_modular(embedded.path("mini-sd3")) and not is_modular(str(tmp_path))
    shutil.copy(f"{embedded.path('mini-sd3')}/model_index.json", tmp_path)
    shutil.copy(saved / INDEX, tmp_path)
    assert not is_modular(str(tmp_path))


@pytest.mark.parametrize("precision, dtype", [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_all_components_are_loaded_wherever_the_folder_lies(saved, precision, dtype, tmp_path):
    moved = shutil.copytree(saved, tmp_path / "elsewhere")
    pipeline, stock = load(moved, mixed_precision=precision), DiffusionPipeline.from_pretrained(embedded.path("mini-sd3"), dtype=dtype)
    assert isinstance(pipeline, StableDiffusion3ModularPipeline)
    assert pipeline.transformer.dtype == dtype
    for name in ("transformer", "vae", "text_encoder"):
        own, expected = getattr(pipeline, name).state_dict(), getattr(stock, name).state_dict()
        assert set(own) == set(expected) and all(torch.equal(value, expected[key]) for key, value in own.items()), name
    assert pipeline.scheduler.config.shift == stock.scheduler.config.shift


def test_a_component_that_is_not_there_is_named(saved, tmp_path):
    broken = shutil.copytree(saved, tmp_path / "broken")
    index = json.loads((broken / INDEX).read_text())
    index["vae"][2]["pretrained_model_name_or_path"] = str(broken)
    (broken / INDEX).write_text(json.dumps(index))
    shutil.rmtree(broken / "vae")
    with pytest.raises(ValueError, match=f"broken: vae could not be loaded.*{INDEX}"):
        load(broken)


def test_blocks_that_are_code_of_the_folders_own_are_refused(saved, tmp_path):
    own = shutil.copytree(saved, tmp_path / "own")
    for name in ("block.py", "modular_config.json"):
        shutil.copy(folder("pipelines") / "best_of_n_block" / name, own)
    for ask in (load, modular_parameters):
        with pytest.raises(ValueError, match="own are code of its own, which scripts do not run"):
            ask(str(own))


def test_what_its_call_takes_is_known_before_it_is_loaded(saved):
    found = modular_parameters(str(saved))
    assert {"prompt", "negative_prompt", "image", "strength", "guidance_scale", "output_type"} <= set(found)
