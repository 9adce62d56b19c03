"""What interrupts a run from outside: too little disk space, a file that cannot be written, Ctrl-C, a scheduler's SIGTERM."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor
from torch.utils import _pytree as pytree

# A picture and its caption in a grid, uncompressed.
CELL_BYTES = 3 * 128 * 142
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(SystemExit):
    """The run was asked to end by a signal, and has said how to go on."""


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
        f"checkpoints ({due} at a time)": due * (3 * weights + sum(_state_bytes(kept) for name, kept in run.registered.items() if name != "optimizer")),
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
        aside = [path.name for path in run.output_dir.glob(".previous-*")]
        earlier = f" Of an earlier run there is still {', '.join(aside)}, which may be deleted." if aside else ""
        raise OSError(
            f"--output_dir {run.output_dir} has {_readable(free)} free, and this run will write about {_readable(sum(expected.values()))}: {parts}. "
            "Free some space, choose another folder, keep fewer checkpoints (--checkpoints_total_limit) or write them less often (--checkpointing_epochs)."
            + earlier
        )


def _readable(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


# What the file system raises, itself or through safetensors; errors of devices and of other processes are none of these.
WRITE_ERRORS = (OSError, SafetensorError)
DISK_ERRORS = {getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EIO", "EROFS", "EACCES", "EFBIG", "ESTALE") if hasattr(errno, name)}


@contextmanager
def complete_or_absent(run, partial: Path) -> Iterator[None]:
    """While a checkpoint is written to `partial`: on any error, remove it; where it could not be written, say what can be resumed.

    Raises:
        OSError: in the place of what safetensors or the file system raise. Other errors stay what they are.
    """
    try:
        yield
    except BaseException as error:
        free = _readable(shutil.disk_usage(run.output_dir).free)
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, WRITE_ERRORS):
            raise OSError(
                f"The checkpoint after epoch {run.epoch} could not be written and is left out: {error} ({free} were free). {how_to_resume(run)}"
            ) from error
        raise


@contextmanager
def writing(folder: Path, then: Callable[[], str], when: str = "") -> Iterator[None]:
    """While files are written: a disk that is full or fails says how much space there is, and `then` what to do.

    Raises:
        OSError: in the place of what safetensors or the file system raise.
    """
    try:
        yield
    except WRITE_ERRORS as error:
        if getattr(error, "errno", errno.ENOSPC) not in DISK_ERRORS:
            raise
        free = _readable(shutil.disk_usage(folder).free)
        raise OSError(f"{folder} could not be written{when}: {error} ({free} are free). {then()}") from error


def resumable(run):
    """`writing` files of a run: an error says how to resume."""
    return writing(run.output_dir, lambda: how_to_resume(run), f" in epoch {run.epoch}")


def how_to_resume(run) -> str:
    """The newest checkpoint that can be resumed, and by which flag."""
    found = run.checkpoints()
    if not found:
        return "There is no checkpoint yet to resume from."
    done = found[-1].name.split("-")[1]
    return f"{found[-1]} is complete ({done} of {run.args.num_epochs} epochs): go on with --resume_from_checkpoint latest."


@contextmanager
def interruptible(run) -> Iterator[None]:
    """Ctrl-C, or a scheduler's SIGTERM, ends the process with one line that says how to resume, and exit status 130, in the place of a traceback.

    A second one is Python's own again. SIGTERM ends the other processes of a run at once, as it would without this. Outside the main thread,
    where Python allows no handlers, nothing changes. A weak reference does for `run`: without it, the handlers are those before.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (SIGNALS if run.is_main else SIGNALS[:1])}

    def restore() -> None:
        for number, handler in before.items():
            if signal.getsignal(number) is stop:
                signal.signal(number, handler)

    def stop(number, frame):
        restore()
        try:
            line = f"Interrupted {getattr(run, 'doing', None) or f'in epoch {run.epoch}'}. {how_to_resume(run)}" if run.is_main else ""
        except ReferenceError:  # the run is gone
            os.kill(os.getpid(), number)
            return
        if line:
            # Not print: the signal may come in the middle of another one.
            os.write(2, f"\n{line}\n".encode())
        run.exit_status = 130
        raise Interrupted(130)

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            restore()
