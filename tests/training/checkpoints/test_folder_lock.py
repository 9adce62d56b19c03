"""One run at a time in a folder."""

import subprocess
import sys
from pathlib import Path

import pytest
from small_run import train

from diffusers_align.training.checkpoints import folder_lock
from diffusers_align.training.checkpoints.folder_lock import FolderLock

# By its file, which needs the standard library alone: importing the package would take seconds.
HOLD = "import pathlib, runpy, sys, time; FolderLock = runpy.run_path(sys.argv[2])['FolderLock']; "
HOLD += "lock = FolderLock(pathlib.Path(sys.argv[1]), 'train_ddpo.py'); print('held', flush=True); time.sleep(600)"
LOCK_FILE = Path(folder_lock.__file__)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of the folder `run`."""
    (tmp_path / "run").mkdir()
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run"), str(LOCK_FILE)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_second_run_is_refused_until_the_first_one_is_gone(tmp_path, holder):
    with pytest.raises(OSError, match=rf"Another run writes to .*run: process {holder.pid} on .* since .* \(train_ddpo.py\). Wait for it, stop it, or choose"):
        train(tmp_path / "run")
    holder.kill()
    holder.wait()
    assert (tmp_path / "run" / ".lock").exists(), "left behind, and no obstacle"
    run = train(tmp_path / "run", 1)
    run.end()
    assert not (tmp_path / "run" / ".lock").exists()


def test_runs_of_one_process_follow_each_other(tmp_path):
    first = FolderLock(tmp_path)
    second = FolderLock(tmp_path)
    first.release()
    assert (tmp_path / ".lock").exists(), "it is the second one's now"
    second.release()
    assert not (tmp_path / ".lock").exists()


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def no_locks(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", no_locks)
    assert "cannot be locked (No locks available)" in FolderLock(tmp_path).warning
