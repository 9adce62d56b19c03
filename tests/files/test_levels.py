"""How well a recipe is known: what its committed curve says, and no more."""

import json

import pytest

from diffusers_align.files import levels
from diffusers_align.files.paths import names

RECIPE, HERE = "draft_mini_sd3", {"torch": "1", "cpu": "any"}


@pytest.fixture
def curves(tmp_path, monkeypatch):
    """The folder of curves, empty, and recipes that may be changed."""
    for recipe in (RECIPE, "pfm_likes_blue_mini_sd"):
        (tmp_path / f"{recipe}.yaml").write_text(levels.find_recipe(recipe).read_text())
    monkeypatch.setattr(levels, "folder", lambda kind: tmp_path / kind)
    monkeypatch.setattr(levels, "find_recipe", lambda name: tmp_path / f"{name}.yaml")
    (tmp_path / "curves").mkdir()
    return tmp_path / "curves"


def curve(**changes):
    metrics = {"reward": [0.1, 0.2]}
    reproduced = {"curve": levels.digest_of(metrics), "machines": [HERE]}
    whole = {"settings": levels.settings_digest(RECIPE), "inputs": levels.inputs_of(RECIPE), "machine": HERE, "metrics": metrics, "reproduced": reproduced}
    return whole | changes


def level_with(curves, **changes):
    (curves / f"{RECIPE}.json").write_text(json.dumps(curve(**changes)))
    return levels.level(RECIPE)


def test_a_reproduced_curve_of_these_settings_and_models_is_verified(curves):
    assert levels.level(RECIPE) == "parsed"
    assert level_with(curves) == "verified"


def test_a_level_is_never_better_than_its_evidence(curves):
    assert level_with(curves, reproduced={}) == "runs"
    assert level_with(curves, reproduced={"curve": levels.digest_of({"reward": [0.1, 0.2]}), "machines": []}) == "runs"
    assert level_with(curves, metrics={"reward": [0.1, 0.3]}) == "runs", "the curve was changed after it was reproduced"
    assert level_with(curves, inputs=levels.inputs_of(RECIPE) | {"mini-sd3": "other weights"}) == "runs"
    assert level_with(curves, settings="other settings") == "parsed"


def test_settings_count_and_comments_do_not(curves):
    assert level_with(curves) == "verified"
    recipe = levels.find_recipe(RECIPE)
    text = recipe.read_text()
    recipe.write_text(text + "# a word more\n")
    assert levels.level(RECIPE) == "verified"
    recipe.write_text(text.replace("learning_rate: 5.0e-4", "learning_rate: 5.1e-4"))
    assert levels.level(RECIPE) == "parsed"


def test_the_commands_that_make_the_data_count(curves):
    recipe = levels.find_recipe("pfm_likes_blue_mini_sd")
    before, commands = levels.settings_digest("pfm_likes_blue_mini_sd"), levels.made_by("pfm_likes_blue_mini_sd")
    assert [command[0].split()[2] for command in commands] == ["training_scripts/make_preferences.py"] * 2
    assert commands[1][-1].endswith("--output_dir runs/likes_blue_mini_sd_heldout")
    recipe.write_text(recipe.read_text().replace("--num_images_per_prompt 8", "--num_images_per_prompt 9"))
    assert levels.settings_digest("pfm_likes_blue_mini_sd") != before


@pytest.mark.parametrize("text", ["no JSON", "[]", "{}"])
def test_a_file_that_is_no_curve_is_named(curves, text):
    (curves / f"{RECIPE}.json").write_text(text)
    with pytest.raises(ValueError, match=f"{RECIPE}.json is no curve .*--record"):
        levels.level(RECIPE)


def test_inputs_are_what_a_recipe_uses():
    assert set(levels.inputs_of(RECIPE)) == {"mini-sd3", "mini-clip", "scene-classifier", "mini_train", "mini_heldout"}
    assert set(levels.inputs_of("pfm_likes_blue_mini_sd")) == {"mini-sd", "scene-classifier", "likes_blue_train", "likes_blue_heldout"}
    assert set(levels.inputs_of("ddpo_sd15")) == {"simple_animals"}


def test_content_digests_see_every_byte(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    first = levels.content_digest(tmp_path)
    levels.content_digest.cache_clear()
    (tmp_path / "b").write_bytes(b"")
    assert levels.content_digest(tmp_path) != first


@pytest.mark.parametrize("recipe", names("recipes"))
def test_shipped_recipes_have_a_level_and_a_script(recipe):
    assert levels.level(recipe) in levels.LEVELS
    assert levels.script_of(recipe) in names("training_scripts")


def test_a_recipe_without_a_script_is_named():
    with pytest.raises(ValueError, match="'nonsense' begins with no training script's name"):
        levels.script_of("nonsense")
