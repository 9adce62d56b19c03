"""Modules are found by the names that they had, for one version, with a word on the new one."""

import importlib
import importlib.util
import sys

import pytest

from diffusers_align.moved import INTO_FOLDERS, MOVED, SPLIT, OldNames, accept_old_names


@pytest.mark.parametrize("old, new", MOVED.items())
def test_an_old_name_has_a_new_one_and_is_no_module(old, new):
    assert OldNames.find_spec(f"diffusers_align.{old}").name == f"diffusers_align.{old}"
    assert importlib.util.find_spec(f"diffusers_align.{new}").origin.endswith(".py")
    assert new not in MOVED
    assert importlib.util.find_spec(f"diffusers_align.{old}").origin is None, "the name is a module's again: take it out of the table"


@pytest.mark.parametrize("old", ["given_names", "gradient_check", "rl.preferences", "rewards.loading", "data.loading", "training.option_types"])
def test_old_and_new_name_are_one_module(old, monkeypatch):
    monkeypatch.delitem(sys.modules, f"diffusers_align.{old}", raising=False)
    with pytest.warns(FutureWarning, match=f"diffusers_align.{old} is diffusers_align.{MOVED[old]} now"):
        module = importlib.import_module(f"diffusers_align.{old}")
    assert module is importlib.import_module(f"diffusers_align.{MOVED[old]}")
    assert module.__name__ == module.__spec__.name == f"diffusers_align.{MOVED[old]}"


@pytest.mark.parametrize("old, new", [(old, new) for old, others in SPLIT.items() for new in (MOVED[old], *others)])
def test_a_module_that_became_several_has_the_names_of_all(old, new, monkeypatch):
    monkeypatch.delitem(sys.modules, f"diffusers_align.{old}", raising=False)
    with pytest.warns(FutureWarning, match=f"diffusers_align.{old} is"):
        module = importlib.import_module(f"diffusers_align.{old}")
    now = importlib.import_module(f"diffusers_align.{new}")
    name = next(name for name, value in vars(now).items() if getattr(value, "__module__", None) == now.__name__ and not name.startswith("_"))
    assert getattr(module, name) is getattr(now, name)
    with pytest.raises(AttributeError, match="it became"):
        module.nothing  # noqa: B018


@pytest.mark.parametrize("old, new", [(old, new) for old, modules in INTO_FOLDERS.items() for new in modules])
def test_folders_hand_on_what_the_modules_had(old, new):
    folder, module = (importlib.import_module(f"diffusers_align.{name}") for name in (old, new))
    name = next(name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__ and not name.startswith("_"))
    with pytest.warns(FutureWarning, match=f"diffusers_align.{new}.{name} now"):
        assert getattr(folder, name) is getattr(module, name)


@pytest.mark.parametrize("old", INTO_FOLDERS)
def test_folders_have_nothing_else(old):
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        getattr(importlib.import_module(f"diffusers_align.{old}"), "nothing")  # noqa: B009


def test_other_names_are_not_found():
    with pytest.raises(ModuleNotFoundError, match="diffusers_align.nothing"):
        importlib.import_module("diffusers_align.nothing")
    before = list(sys.meta_path)
    accept_old_names()
    assert sys.meta_path == before and before.index(OldNames) > 0
