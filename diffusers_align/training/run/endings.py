"""How a run's process ends: with status 0 only after the run has.

Code of the user's (a reward, a captioner) may call `sys.exit`, and a loop over `Run.epochs` may be left half way. Either would end the
process as a success, and a job script would take what is in the output folder for the result.
"""

from __future__ import annotations

import atexit
import os
import sys

from .failures import how_to_resume

_runs: list = []


def watch(run) -> None:
    """From now on a process that this run's script is the main module of does not end with status 0 before `run.finished`."""
    main = sys.modules.get("__main__")
    frame = sys._getframe(2)  # who made the run; a module that is imported has a caller, who decides what its exceptions mean
    if frame.f_globals.get("__name__") == "__main__" and getattr(main, "__file__", None):
        _runs.append((os.getpid(), run))


def unfinished() -> list:
    """The runs of this process that have not come to their end."""
    return [run for pid, run in _runs if pid == os.getpid() and not run.finished]


def _at_exit() -> None:
    """Before the interpreter ends. An exception that nobody caught has set the status already; everything else counts as a success."""
    left = unfinished()
    if not left or getattr(sys, "last_value", None) is not None:
        return
    run = left[-1]
    if run.exit_status is None and run.is_main:
        done = f"{run.epoch} of {run.args.num_epochs} epochs"
        why = "by sys.exit in a reward or other code that it calls, or by leaving the loop over its epochs"
        print(f"\nThe run has not finished: its process was ended after {done}, {why}. {how_to_resume(run)}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(run.exit_status or 1)  # an exception would not change the status here


# Handlers run in the reverse order: those of trackers, registered later, have done their work by then.
atexit.register(_at_exit)
