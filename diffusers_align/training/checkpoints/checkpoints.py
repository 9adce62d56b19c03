"""Checkpoints of a run in its output folder: written whole or not at all, checked before they are read, pruned, set aside.

A checkpoint holds a file `manifest.json`, written last: what made it (algorithm, flags, commands) and the size and CRC-32 of every other file.
Only the main process reads and writes, so that the machines of a run need not share a disk.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from ... import __version__
from ..run import costs, failures
from . import allowed_changes
from .state_adapters import random_state, restore_random_state
from .state_files import read_state, write_state

MANIFEST, RANDOM, LOGS = "manifest.json", "random_states", "logs"
LORA = "pytorch_lora_weights.safetensors"
# What a run leaves beside its checkpoints: files and pictures, and what was learned, a LoRA, a preference flow or a value.
RESULTS = (
    "metrics.jsonl", "reward_curve.png", "before_after.png", "samples", "sounds", "widget", costs.FILE, "README.md",
    LORA, "model_index.json", "vector_field", "value",
)  # fmt: skip


def found(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, in the order of their epochs."""
    numbered = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit() and path.is_dir()]
    return sorted(numbered, key=epoch_of)


def epoch_of(checkpoint: Path) -> int:
    """How many epochs a checkpoint has seen, by its name."""
    return int(checkpoint.name.split("-")[-1])


# --- writing -------------------------------------------------------------------------------------------------------------


def save(run) -> None:
    """Write `checkpoint-<epoch>`, complete or not at all; all processes call it together.

    Raises:
        OSError: it could not be written; those before it are intact.
    """
    final, partial = run.output_dir / f"checkpoint-{run.epoch}", run.output_dir / f".checkpoint-{run.epoch}.partial"
    cost = run.meter.total()
    random = gather_object([random_state(run.accelerator.device)])

    def write() -> None:
        with failures.complete_or_absent(run, partial):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            for name, registered in run.registered.items():
                write_state(partial, name, registered.state_dict())
            write_state(partial, RANDOM, random)
            run.save_weights(partial)
            cost.write(partial)
            seal(partial, {"version": __version__, "states": list(run.registered), **(run.made_by or allowed_changes.made_by(run))})
            _remove(final)
            partial.rename(final)
        limit = run.args.checkpoints_total_limit
        for old in run.checkpoints()[: -limit if limit else 0]:
            _remove(old)
        with failures.resumable(run):
            shutil.copy(final / costs.FILE, run.output_dir)

    run.on_main(write)


def seal(folder: Path, about: dict[str, Any]) -> None:
    """Write the manifest: the folder is complete."""
    files = {path.relative_to(folder).as_posix(): [path.stat().st_size, _crc(path)] for path in sorted(folder.rglob("*")) if path.is_file()}
    (folder / MANIFEST).write_text(json.dumps({**about, "files": files}, indent=1) + "\n", encoding="utf-8")


def _crc(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


# --- reading -------------------------------------------------------------------------------------------------------------


def fault(folder: Path) -> str | None:
    """The first thing that is wrong with a checkpoint, with the file's name; None if it is as it was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = dict(manifest["files"])
        missing = (allowed_changes.MADE_BY | {"states"}) - manifest.keys()
    except FileNotFoundError:
        return f"{MANIFEST} is missing" if any(folder.iterdir()) else "the folder is empty"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"
    if missing:
        return f"{MANIFEST} says nothing of {', '.join(sorted(missing))}"
    if not (isinstance(manifest["flags"], dict) and isinstance(manifest["contents"], dict) and manifest["commands"]):
        return f"{MANIFEST} does not say how it was made"
    for name, (size, crc) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, of {size}"
        try:
            if _crc(path) != crc:
                return f"the content of {name} has changed since it was written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def choose(run, wanted: str) -> tuple[Path | None, str]:
    """The checkpoint that `--resume_from_checkpoint` asks for, None if there is none yet, and what is to be said about the choice.

    Raises:
        FileNotFoundError: the named checkpoint does not exist.
        OSError: it is damaged, or `latest` finds damaged ones only.
    """
    candidates = found(run.output_dir)
    if wanted == "latest":
        return _newest(run.output_dir, candidates)
    folder = Path(wanted) if Path(wanted).is_dir() else run.output_dir / wanted
    if not folder.is_dir():
        raise FileNotFoundError(f"No checkpoint {wanted!r}; {run.output_dir} has {', '.join(p.name for p in candidates) or 'none'}.")
    if wrong := fault(folder):
        others = [path for path in found(folder) or found(folder.parent) if path.name != folder.name]
        last = next((path for path in reversed(others) if fault(path) is None), None)
        advice = f"The last complete one is {last}: name it with --resume_from_checkpoint." if last else "There is no complete one beside it."
        raise OSError(f"{folder} cannot be resumed from: {wrong}. {advice}")
    return folder, ""


def _newest(output_dir: Path, candidates: list[Path]) -> tuple[Path | None, str]:
    damaged = []
    for folder in reversed(candidates):
        wrong = fault(folder)
        if wrong is None:
            return folder, f"{'; '.join(damaged)}. Using {folder.name}, the last complete one, in its stead." if damaged else ""
        damaged.append(f"{folder.name} is damaged: {wrong}")
    if damaged:
        raise OSError(
            f"No checkpoint in {output_dir} can be resumed from: {'; '.join(damaged)}. Leave out --resume_from_checkpoint to start from the beginning."
        )
    aside = sorted(path.name for path in output_dir.glob(".previous-checkpoint-*"))
    hint = f" To go on with the run that was set aside, name its checkpoint: {', '.join(aside)}." if aside else ""
    return None, f"No checkpoint in {output_dir} yet: starting from the beginning.{hint}"


def restore(run) -> None:
    """Go on from `--resume_from_checkpoint`, or begin; all processes call it together, when everything is registered.

    Raises:
        FileNotFoundError, OSError: as `choose`.
        ValueError: the checkpoint is of another algorithm, of other flags, or of a model of other shapes.
    """
    wanted = run.args.resume_from_checkpoint
    made_by = run.made_by = run.on_main(lambda: allowed_changes.made_by(run))
    folder, said = run.on_main(lambda: choose(run, wanted)) if wanted else (None, "")
    if said:
        run.print(said)
    if folder is None:
        run.on_main(lambda: begin(run))
        return
    manifest = run.on_main(lambda: json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    notes = allowed_changes.compare(manifest, made_by, run.args.allow_changes, folder.name, type(run.args))
    notes += _load(run, folder, manifest)
    allowed_changes.check_epochs(run, folder.name)
    made_by["commands"] = allowed_changes.history(manifest["commands"], made_by["commands"], run.epoch)
    run.meter.resume(run.on_main(lambda: costs.Cost.read(folder)))
    if folder.resolve().parent != run.output_dir.resolve():  # another run's: this one begins in its folder
        run.on_main(lambda: begin(run))
    if later := run.on_main(lambda: set_aside(run.output_dir, [path for path in run.checkpoints() if epoch_of(path) > run.epoch])):
        notes.append(f"Later checkpoints are of epochs that are now trained again: {', '.join(later)} renamed to .previous-*.")
    run.print(f"Resumed from {folder.name}: {run.epoch} of {run.args.num_epochs} epochs are done.")
    for note in notes:
        run.print(note)


def _load(run, folder: Path, manifest: dict[str, Any]) -> list[str]:
    """Give each registered object its state. Returns what is to be said."""
    there, notes = manifest["states"], []
    for name in run.registered:
        if name not in there and run.fresh.get(name) is None:
            raise ValueError(f"{folder.name} holds no {_words(name)}, which this run needs: resume with the flags that it was made with, or start a new run.")
    for name, registered in run.registered.items():
        if name in there:
            registered.load_state_dict(run.on_main(lambda name=name: read_state(folder, name)))
        else:
            run.fresh[name]()
            notes.append(f"{folder.name} holds no {_words(name)}: it starts from here.")
    notes += [f"The {_words(name)} of {folder.name} is not used." for name in there if name not in run.registered]
    states, index = run.on_main(lambda: read_state(folder, RANDOM)), run.accelerator.process_index
    if index < len(states):
        restore_random_state(states[index], run.accelerator.device)
    return notes


def _words(name: str) -> str:
    return name.replace("_", " ")


# --- what is in the way -----------------------------------------------------------------------------------------------------


def begin(run) -> None:
    """A new run begins: what an earlier one left in the folder is set aside, and what had been set aside before goes.

    Raises:
        OSError: what is there is of no run.
    """
    folder = run.output_dir
    results = sorted((path for path in folder.iterdir() if _of_a_run(path, path.name)), key=lambda path: (not path.name.startswith("checkpoint-"), path.name))
    if not results:
        return
    if not (folder / "metrics.jsonl").exists() and not any((path / MANIFEST).exists() for path in found(folder)):
        raise OSError(
            f"--output_dir {folder} holds {', '.join(path.name for path in results)}, and neither metrics.jsonl nor a checkpoint of a run of these scripts: "
            "it is something else, which a run would overwrite. Choose another folder."
        )
    set_aside(folder, results)
    kept = {f".previous-{path.name}" for path in results}
    stale = [path for path in folder.glob(".previous-*") if path.name not in kept and _of_a_run(path, path.name.removeprefix(".previous-"))]
    for path in stale:
        _remove(path)
    run.print(
        f"{folder} holds an earlier run: {', '.join(path.name for path in results)} are renamed to .previous-* before this one starts anew"
        f"{', and those that were set aside before it are deleted' if stale else ''}. To go on instead: --resume_from_checkpoint."
    )


def _of_a_run(path: Path, name: str) -> bool:
    """Whether a run leaves the like under this name: a result, a checkpoint, a further denoiser's LoRA. Other runs, in folders of their own, are none."""
    if name.startswith(("unet", "transformer")):
        return path.is_dir() and [inside.name for inside in path.iterdir()] == [LORA]
    return name in RESULTS or re.fullmatch(r"checkpoint-\d+", name) is not None


def set_aside(folder: Path, paths: Iterable[Path]) -> list[str]:
    """Rename what is not to be resumed, counted or overwritten to `.previous-<name>`, in the place of what has that name. Returns the names."""
    paths = list(paths)
    for path in paths:
        aside = folder / f".previous-{path.name}"
        _remove(aside)
        path.rename(aside)
    return [path.name for path in paths]


def set_results_aside(folder: Path, names: Iterable[str]) -> None:
    """What a command that has no checkpoints is about to write may be there from an earlier one, in which there are hours of sampling."""
    if there := [folder / name for name in names if (folder / name).exists()]:
        print(f"{folder} holds earlier results: {', '.join(set_aside(folder, there))} renamed to .previous-*.")


def set_logs_aside(run) -> str:
    """Trackers append to the logs in a folder: those of an earlier run are not to be continued by a new one. Before the trackers are opened, in which the
    run has the name that this returns. Logs of other names may be somebody else's."""
    name = run.args.run_name or run.output_dir.resolve().name
    logs, aside = (run.output_dir / place / name for place in (LOGS, f".previous-{LOGS}"))
    if not run.args.resume_from_checkpoint and logs.is_dir():
        _remove(aside)
        aside.parent.mkdir(parents=True, exist_ok=True)
        logs.rename(aside)
        run.print(f"{logs} is of an earlier run: renamed to {aside}.")
    return name


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
