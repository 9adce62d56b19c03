"""A script that is left before its end is no success."""

import runpy

import pytest

from diffusers_align.training.run import endings

SCRIPT = """
import sys
from types import SimpleNamespace
from diffusers_align.training.run import endings
class Made:
    finished, exit_status, is_main, epoch, output_dir = False, None, True, 1, "out"
    args = SimpleNamespace(num_epochs=3)
    checkpoints = lambda self: []
    def __init__(self):
        endings.watch(self)
def main():
    return Made()
run = main()
"""


@pytest.fixture
def made(tmp_path, monkeypatch):
    """The run of a script, by the name that its module has."""
    monkeypatch.setattr(endings, "_runs", [])
    (tmp_path / "script.py").write_text(SCRIPT)
    return lambda name: runpy.run_path(str(tmp_path / "script.py"), run_name=name)["run"]


def status(monkeypatch):
    """With what status the process would be ended; None if it is left alone."""
    found = []
    monkeypatch.setattr(endings.os, "_exit", found.append)
    endings._at_exit()
    return found[0] if found else None


def test_a_script_that_is_left_before_its_end_is_no_success(made, monkeypatch, capsys):
    monkeypatch.delattr("sys.last_value", raising=False)
    run = made("__main__")
    assert endings.unfinished() == [run] and status(monkeypatch) == 1
    assert "The run has not finished: its process was ended after 1 of 3 epochs, by sys.exit" in capsys.readouterr().err
    run.exit_status = 130
    assert status(monkeypatch) == 130 and capsys.readouterr().err == "", "Ctrl-C has said its own line"
    run.finished = True
    assert status(monkeypatch) is None


def test_an_exception_has_its_own_status_and_an_imported_script_its_caller(made, monkeypatch):
    made("__main__")
    monkeypatch.setattr("sys.last_value", ValueError(), raising=False)
    assert status(monkeypatch) is None
    endings._runs.clear()
    made("train_something")
    assert endings.unfinished() == []
