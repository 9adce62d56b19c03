"""Front doors and recipes by name."""

from pathlib import Path

import pytest

from diffusers_align.files.paths import find_recipe, front_door, names

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["ddpo_mini_sd", "ddpo_mini_sd.yaml", "training_scripts/recipes/ddpo_mini_sd.yaml"])
def test_a_recipe_is_found_from_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe(name) == ROOT / "training_scripts" / "recipes" / "ddpo_mini_sd.yaml"
    own = tmp_path / "ddpo_mini_sd.yaml"
    own.write_text("rank: 4\n")
    assert find_recipe("ddpo_mini_sd.yaml") == Path("ddpo_mini_sd.yaml"), "a file of one's own comes first"
    assert find_recipe(str(own)) == own


def test_a_recipe_that_is_nowhere_is_named_with_those_near():
    for name in ("ddpo_mini_sdd", "other/ddpo_mini_sd.yaml"):
        with pytest.raises(FileNotFoundError, match="no recipe.*Did you mean .*ddpo_mini_sd.*diffusers-align list recipes"):
            find_recipe(name)


def test_an_unknown_front_door_lists_those_there_are():
    with pytest.raises(FileNotFoundError, match="flow_grpo_fast"):
        front_door("schedulers", "nothing")
    assert {"ddpo", "flow_grpo", "flow_grpo_fast", "dance_grpo", "cps", "memoryless"} <= set(names("schedulers"))
    assert {"best_of_n", "reward_guided", "best_of_n_block", "reward_guided_block"} <= set(names("pipelines"))
