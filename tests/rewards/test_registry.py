"""Rewards by name: built in, in modules and files, with their options; and what a wrong name is told."""

import ast
import sys
from pathlib import Path

import huggingface_hub
import pytest
import reward_models
import torch
from reward_models import PROMPTS, brightness

import diffusers_align.rewards
from diffusers_align.rewards import load_reward, score
from diffusers_align.rewards.jpeg import jpeg_compressibility, jpeg_incompressibility

BUILT_IN_NAMES = (
    "jpeg_compressibility", "jpeg_incompressibility", "aesthetic", "background_color", "clip_score", "edit_direction", "edit_preservation",
    "hps_v2", "image_reward", "ocr", "pick_score", "scene_judge", "scene_score", "spectral_centroid", "vlm_judge",
)  # fmt: skip


# --- load_reward ----------------------------------------------------------------------------------------------------


def test_load_reward_finds_built_ins_modules_and_files(tmp_path, monkeypatch):
    assert load_reward("jpeg_compressibility") is jpeg_compressibility
    assert load_reward(brightness) is brightness
    source = "import torch\nclass Constant:\n    def __init__(self, value=1.0): self.value = value\n"
    source += "    def __call__(self, images, prompts, **columns): return torch.full((len(images),), self.value)\n"
    (tmp_path / "my_test_rewards.py").write_text(source + "def one(images, prompts): return torch.ones(len(images))\nnumber = 3\n")
    images = torch.rand(2, 3, 4, 4)
    file = tmp_path / "my_test_rewards.py"
    assert score(load_reward(f"{file}:one"), images, PROMPTS)["reward"].tolist() == [1, 1]
    assert score(load_reward(f"{file}:Constant", value=4.0), images, PROMPTS)["reward"].tolist() == [4, 4]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert score(load_reward("my_test_rewards:Constant"), images, PROMPTS)["reward"].tolist() == [1, 1]
    result = score(load_reward("my_test_rewards.py:one*2 + my_test_rewards:Constant*-1e-1 + jpeg_compressibility", value=5.0), images, PROMPTS)
    torch.testing.assert_close(result["reward"], 2 - 0.5 + jpeg_compressibility(images, PROMPTS))
    assert set(result) == {"reward", "one", "Constant", "jpeg_compressibility"}


def test_a_reward_file_imports_what_lies_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "a_helper_of_rewards.py").write_text("def mean(images): return images.flatten(1).mean(1)\n")
    (tmp_path / "uses_it.py").write_text("from a_helper_of_rewards import mean\ndef f(images, prompts): return mean(images)\n")
    assert score(load_reward(f"{tmp_path / 'uses_it.py'}:f"), torch.ones(2, 3, 4, 4), PROMPTS)["reward"].tolist() == [1, 1]


def test_load_reward_passes_options_to_those_that_take_them():
    images = torch.rand(2, 3, 16, 16)
    worse = load_reward("jpeg_incompressibility", quality=10)(images, PROMPTS)
    torch.testing.assert_close(worse, jpeg_incompressibility(images, PROMPTS, quality=10))
    assert (worse < jpeg_incompressibility(images, PROMPTS)).all()
    assert load_reward(f"{reward_models.__file__}:Scaled", factor=2.0, device="meta").device == "meta"
    with pytest.raises(ValueError, match="'jpeg_compressibility' takes no option 'model'"):
        load_reward("jpeg_compressibility", model="x")


@pytest.mark.parametrize(
    "spec, message",
    [
        ("clip_scor", r"There is no reward 'clip_scor'. Did you mean 'clip_score'\?.*pick_score.*'module:function'"),
        ("nothing_like_it", r"There is no reward 'nothing_like_it'. Built in: aesthetic, background_color, clip_score"),
        ("no_such_module:f", "there is no module 'no_such_module', neither installed nor in"),
        ("no_such_file.py:f", "there is no file .*no_such_file.py"),
        ("math:squrt", r"'math' has no 'squrt'. Did you mean 'sqrt'\?"),
        ("math:pi", "'math:pi' is a float: a function or a class is needed"),
        ("fractions:Fraction", "objects of that class cannot be called"),
        ("clip_score*", "Cannot read the reward"),
        ("clip_score*a", "Cannot read the reward"),
        ("", "Cannot read the reward"),
    ],
)
def test_a_name_that_finds_nothing_says_what_to_write(spec, message):
    with pytest.raises(ValueError, match=message):
        load_reward(spec)


def test_an_import_error_inside_a_reward_is_not_hidden(tmp_path):
    (tmp_path / "broken.py").write_text("import a_dependency_that_is_missing\n")
    with pytest.raises(ModuleNotFoundError, match="a_dependency_that_is_missing"):
        load_reward(f"{tmp_path / 'broken.py'}:f")


def test_built_ins_are_complete_and_importing_them_is_light():
    assert set(diffusers_align.rewards.BUILT_INS) == set(BUILT_IN_NAMES)
    light = set(sys.stdlib_module_names) | {"torch", "__future__"}
    for file in Path(diffusers_align.rewards.__file__).parent.glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                parts = {node.module or alias.name for alias in node.names} if node.level > 1 else set()
                assert parts <= {"checks.ranges", "files"}, f"{file.name} imports a part of the package that is not light at its top level"
                names = [node.module] if node.level == 0 else []
            assert {name.split(".")[0] for name in names} <= light, file.name


@pytest.mark.parametrize("name", ["aesthetic", "clip_score", "edit_direction", "hps_v2", "image_reward", "pick_score"])
def test_a_model_that_cannot_be_had_is_a_sentence(name, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match=r"^No (CLIP model|checkpoint) '[\w-]+/[\w.-]+': there is no such folder here, and from the Hub: HF_HUB_OFFLINE"
    ):
        load_reward(name)
    with pytest.raises(FileNotFoundError, match="'nobody/nothing'"):
        load_reward(name, model="nobody/nothing")


def test_an_edited_file_is_loaded_anew_and_one_that_is_not_once(tmp_path):
    file = tmp_path / "mine.py"
    for value in (1, 2):
        file.write_text(f"def f(images, prompts, **columns): return 0 * images.mean((1, 2, 3)) + {value}")
        reward = load_reward(f"{file}:f")
        assert score(reward, torch.rand(1, 3, 4, 4), ["a"])["reward"].tolist() == [value] and load_reward(f"{file}:f") is reward
