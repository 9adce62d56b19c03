"""A command in a process of its own, on one thread of the CPU, with its output in a file: what benchmarks that train share."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
EVERY = 30.0  # seconds between two words about progress


class Failed(RuntimeError):
    """A command ended with another status than 0; the message says where its output is."""


def named(command: list[str]) -> str:
    """What a command runs: the script's file, or the module behind `-m`."""
    return command[2] if command[1] == "-m" else Path(command[1]).name


def call(command: list[str], log: Path, place: Path | None = None, progress: Callable[[float], None] = lambda seconds: None) -> None:
    """Run a Python script to its end. An interrupt is handed on, and waited for, so that what the script was writing is whole.

    Args:
        command: interpreter, script and flags. The script finds this package, whose rewards are named by module.
        log: its output is added there.
        place: the working directory.
        progress: is called now and then with the seconds that have passed.

    Raises:
        Failed: it did.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    start = told = time.monotonic()
    with log.open("a") as file:
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": path}
        process = subprocess.Popen(command, cwd=place, env=environment, stdout=file, stderr=file, start_new_session=True)
        try:
            while process.poll() is None:
                time.sleep(0.2)
                if time.monotonic() - told > EVERY:
                    told = time.monotonic()
                    progress(told - start)
        except BaseException:
            process.send_signal(signal.SIGINT)
            process.wait()
            raise
    if process.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
        raise Failed(f"{named(command)} ended with status {process.returncode}; its output is in {log}:\n{tail}")
