"""What interrupts a run from outside: too little disk space, a checkpoint that cannot be written, Ctrl-C."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor
from torch.utils import _pytree as pytree

# A picture and its caption in a grid, uncompressed.
CELL_BYTES = 3 * 128 * 142


def expected_bytes(run) -> dict[str, int]:
    """What the rest of a run will write at most, by kind, in bytes.

    A checkpoint holds the weights for `load_lora_weights`, Adam's two moments, and the state of all that was registered: the weights
    once more, averages, value networks. While the newest is written, `--checkpoints_total_limit` of them are still there.
    """
    args = run.args
    weights = sum(4 * parameter.numel() for parameter in run.parameters)
    due = sum(epoch % args.checkpointing_epochs == 0 or epoch == args.num_epochs for epoch in range(run.epoch + 1, args.num_epochs + 1))
    if args.checkpoints_total_limit:
        due = min(due, max(1, args.checkpoints_total_limit + 1 - len(run.checkpoints())))
    grids = args.num_epochs // args.validation_epochs - run.epoch // args.validation_epochs + 2
    return {
        f"checkpoints ({due} at a time)": due * (3 * weights + sum(map(_state_bytes, run.accelerator._custom_objects))),
        "weights": weights,
        "pictures": grids * args.num_validation_images * CELL_BYTES,
    }


def _state_bytes(registered) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in pytree.tree_leaves(registered.state_dict()) if isinstance(leaf, Tensor))


def check_free_space(run) -> None:
    """Find out before training that the output folder's disk is too small for the run.

    Raises:
        OSError: it is.
    """
    expected, free = expected_bytes(run), shutil.disk_usage(run.output_dir).free
    if free < sum(expected.values()):
        parts = ", ".join(f"{kind} {_readable(size)}" for kind, size in expected.items())
        raise OSError(
            f"--output_dir {run.output_dir} has {_readable(free)} free, and this run will write about {_readable(sum(expected.values()))}: {parts}. "
            "Free some space, choose another folder, keep fewer checkpoints (--checkpoints_total_limit) or write them less often (--checkpointing_epochs)."
        )


def _readable(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


@contextmanager
def complete_or_absent(run, partial: Path) -> Iterator[None]:
    """While a checkpoint is written to `partial`: on an error, remove it and say what can be resumed.

    Raises:
        OSError: in the place of what torch, safetensors or the file system raise.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        free = _readable(shutil.disk_usage(run.output_dir).free)
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"The checkpoint after epoch {run.epoch} could not be written and is left out: {error} ({free} were free). {how_to_resume(run)}"
        ) from error


def how_to_resume(run) -> str:
    """The newest checkpoint that can be resumed, and by which flag."""
    found = run.checkpoints()
    if not found:
        return "There is no checkpoint yet to resume from."
    done = found[-1].name.split("-")[1]
    return f"{found[-1]} is complete ({done} of {run.args.num_epochs} epochs): go on with --resume_from_checkpoint latest."


@contextmanager
def interruptible(run) -> Iterator[None]:
    """Ctrl-C ends the process with one line that says how to resume, and exit status 130, in the place of a traceback.

    A second Ctrl-C is Python's own again. Outside the main thread, where Python allows no handlers, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def stop(signum, frame):
        signal.signal(signal.SIGINT, before)
        if run.is_main:
            # Not print: the signal may come in the middle of another one.
            os.write(2, f"\nInterrupted in epoch {run.epoch}. {how_to_resume(run)}\n".encode())
        run.exit_status = 130
        raise SystemExit(130)

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is stop:
            signal.signal(signal.SIGINT, before)
