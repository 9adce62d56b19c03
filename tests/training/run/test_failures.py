"""What a run loses to a kill, Ctrl-C, a full or an unwritable disk: nothing that a checkpoint holds, and no time."""

import errno
import gc
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from script_runs import ENVIRONMENT, LORA, SCRIPTS, STATEFUL, arguments, assert_same_run, rows, script, started, train
from script_runs import task as task  # noqa: F401 - a fixture
from script_tools import make_run

from diffusers_align import embedded
from diffusers_align.training.checkpoints import checkpoints
from diffusers_align.training.report import hub
from diffusers_align.training.run import failures
from diffusers_align.training.run.run import Run

Disk = namedtuple("Disk", "total used free")
EPOCHS = {"num_epochs": 3, "validation_epochs": 2}
KILLED = ("flow_grpo", "ddpo")


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# --- kill --------------------------------------------------------------------------------------------------------------


def train_and_die_in_checkpoint(number, name, out, task, flags):  # noqa: F811
    """Train, and be killed when the state of checkpoint `number` is half on disk."""
    write_state = checkpoints.write_state

    def write_and_die(folder, name, state):
        write_state(folder, name, state)
        if folder.name == f".checkpoint-{number}.partial" and name == "optimizer":
            file = folder / "optimizer.safetensors"
            os.truncate(file, file.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoints.write_state = write_and_die
    train(name, out, task, **flags)


def train_with(name, out, task, flags):  # noqa: F811
    train(name, out, task, **flags)


@pytest.fixture(scope="module")
def processes():
    """Starts functions in processes of their own, forked from one that has imported everything and run nothing."""
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_failures"])
    running = []

    def start(function, *args):
        running.append(context.Process(target=function, args=args))
        running[-1].start()
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.join()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture(scope="module")
def finished(tmp_path_factory, task):  # noqa: F811
    """An uninterrupted run of each script, and how long its epochs took after the first."""
    runs = {}

    def get(name):
        if name not in runs:
            out = train(name, tmp_path_factory.mktemp(name) / "run", task, **STATEFUL[name], **EPOCHS)
            first, last = ((out / f"checkpoint-{epoch}").stat().st_mtime for epoch in (1, EPOCHS["num_epochs"]))
            runs[name] = (out, last - first)
        return runs[name]

    return get


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)


@pytest.mark.long
@pytest.mark.parametrize("name", KILLED)
def test_killed_at_a_random_moment_and_resumed_equals_uninterrupted(finished, processes, task, tmp_path, name):  # noqa: F811
    out, flags = tmp_path / "run", {**STATEFUL[name], **EPOCHS}
    whole, duration = finished(name)
    for attempt in range(5):  # it may have ended before it was killed
        shutil.rmtree(out, ignore_errors=True)
        process = processes(train_with, name, out, task, flags)
        wait_for(lambda: (out / "checkpoint-1").exists() or not process.is_alive())
        delay = random.Random().uniform(0, duration / 2**attempt)
        time.sleep(delay)
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            break
    assert process.exitcode == -signal.SIGKILL
    print(f"killed {delay:.3f} s after the first checkpoint")
    train(name, out, task, resume_from_checkpoint="latest", **flags)
    assert_same_run(out, whole, "checkpoint-3")


@pytest.mark.long
@pytest.mark.parametrize("name", KILLED)
def test_killed_while_it_wrote_a_checkpoint_and_resumed_equals_uninterrupted(finished, processes, task, tmp_path, name):  # noqa: F811
    out, flags = tmp_path / "run", {**STATEFUL[name], **EPOCHS}
    process = processes(train_and_die_in_checkpoint, 2, name, out, task, flags)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert sorted(p.name for p in out.glob("*checkpoint-*")) == [".checkpoint-2.partial", "checkpoint-1"] and (out / ".lock").exists()
    train(name, out, task, resume_from_checkpoint="latest", **flags)
    assert_same_run(out, finished(name)[0], "checkpoint-3")
    assert not list(out.glob(".*"))


# --- Ctrl-C ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ctrl_c_says_what_can_be_resumed(task, tmp_path):  # noqa: F811
    argv = arguments("ddpo", tmp_path / "run", task, num_epochs=500, checkpoints_total_limit=2)
    with started([sys.executable, str(script("ddpo")), *argv], tmp_path / "log") as process:
        wait_for(lambda: (tmp_path / "run" / "checkpoint-1").exists() or process.poll() is not None, 240)
        process.send_signal(signal.SIGINT)
        process.wait(60)
    printed = (tmp_path / "log").read_text()
    assert process.returncode == 130 and "Traceback" not in printed
    assert "\nInterrupted in epoch " in printed and "of 500 epochs): go on with --resume_from_checkpoint latest.\n" in printed
    assert f" {tmp_path / 'run' / 'checkpoint-'}" in printed


def test_ctrl_c_before_the_first_checkpoint(tmp_path, capfd):
    run = SimpleNamespace(is_main=True, epoch=0, checkpoints=lambda: [])
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stop, failures.interruptible(run):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert stop.value.code == 130 and signal.getsignal(signal.SIGINT) == before
    assert "Interrupted in epoch 0. There is no checkpoint yet to resume from." in capfd.readouterr().err


def test_a_second_ctrl_c_is_pythons_own():
    run = SimpleNamespace(is_main=False, epoch=0, checkpoints=lambda: [])
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt), failures.interruptible(run):
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
            finally:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
    finally:
        signal.signal(signal.SIGINT, inherited)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_with_one_line_wherever_it_comes(tmp_path, capfd, number):
    before = signal.getsignal(number)
    run = make_run(tmp_path / "run", num_epochs=4, checkpointing_epochs=2, allow_no_signal=True)
    run.train_parameters([torch.nn.Parameter(torch.zeros(3))], lambda folder: None)
    run.load_optimizer(4)
    run.resume()
    places = [("before training. There is no checkpoint yet to resume from.", lambda: None)]
    epochs = run.epochs()
    places += [("in epoch 0. There is no checkpoint", lambda: next(epochs))]
    places += [(f"in epoch 2. {run.output_dir}/checkpoint-2 is complete .2 of 4 epochs.: go on with --resume", lambda: (next(epochs), next(epochs)))]
    places += [("after training, before the results were complete. .*checkpoint-4 is complete .4 of 4", lambda: list(epochs))]
    for line, walk in places:
        walk()
        with failures.interruptible(run), pytest.raises(failures.Interrupted) as stop:
            os.kill(os.getpid(), number)
            time.sleep(1)
        assert stop.value.code == 130 and re.search(f"^Interrupted {line}", capfd.readouterr().err, re.MULTILINE)
    assert signal.getsignal(number) != before
    run.end()
    assert signal.getsignal(number) == before


def test_a_run_that_is_gone_leaves_the_signals_as_they_were(tmp_path):
    gc.collect()  # of runs of other tests
    before = [signal.getsignal(number) for number in failures.SIGNALS]
    run = make_run(tmp_path / "run")
    assert all(signal.getsignal(number) != handler for number, handler in zip(failures.SIGNALS, before))
    del run
    gc.collect()
    assert [signal.getsignal(number) for number in failures.SIGNALS] == before


# --- upload --------------------------------------------------------------------------------------------------------------


def test_a_name_that_the_hub_does_not_allow_is_found_before_anything_is_loaded(task, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("diffusers_align.training.report.report.reward_of_flags", None)
    with pytest.raises(ValueError, match="--push_to_hub: the output folder's name, for want of --hub_model_id, 'my run' is no name of a repository"):
        train("ddpo", tmp_path / "my run", task, push_to_hub=True)
    with pytest.raises(ValueError, match="--push_to_hub: --hub_model_id 'a/b/c' is no name of a repository"):
        train("ddpo", tmp_path / "run", task, push_to_hub=True, hub_model_id="a/b/c")


def test_a_hub_that_cannot_be_reached_is_found_before_anything_is_loaded(task, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("diffusers_align.training.report.report.reward_of_flags", None)
    monkeypatch.setattr(hub, "create_repo", lambda *args, **kwargs: (_ for _ in ()).throw(ConnectionError("[Errno 111] Connection refused\nmore")))
    with pytest.raises(OSError, match="repository 'run' could not be made: .*Connection refused. Look at the network, at the login"):
        train("ddpo", tmp_path / "run", task, push_to_hub=True)


def test_a_failed_upload_comes_last_and_says_how_to_make_up_for_it(task, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(hub, "create_repo", lambda name, **kwargs: SimpleNamespace(repo_id=f"me/{name}"))
    monkeypatch.setattr(hub, "upload_folder", lambda **kwargs: (_ for _ in ()).throw(RuntimeError("403 Forbidden: you have no write access")))
    out = tmp_path / "run"
    message = rf"upload to me/run failed: 403 Forbidden: you have no write access. Everything is in {out}; to upload it: hf upload me/run {out} . --exclude"
    with pytest.raises(OSError, match=message):
        train("ddpo", out, task, push_to_hub=True)
    printed = capsys.readouterr().out
    assert re.search(r"^gain in .*: [-+]\d", printed, re.MULTILINE) and f"LoRA, pictures and model card: {out}" in printed and (out / "README.md").is_file()


# --- disk --------------------------------------------------------------------------------------------------------------


def sized(**flags):
    """A run of 1000 trainable numbers, 10 epochs and checkpoints at 4, 8 and 10."""
    defaults = {"num_epochs": 10, "checkpointing_epochs": 4, "checkpoints_total_limit": None, "validation_epochs": 5, "num_validation_images": 16}
    weights = SimpleNamespace(state_dict=lambda: {"0": torch.zeros(10, 100)})
    run = SimpleNamespace(args=SimpleNamespace(**{**defaults, **flags}), epoch=0, parameters=[torch.zeros(10, 100)], checkpoints=lambda: [], output_dir="out")
    run.registered = {"weights": weights, "run": SimpleNamespace(state_dict=lambda: {"epoch": 3})}
    return run


@pytest.mark.parametrize(
    "changes, flags, number",
    [
        ({}, {}, 3),
        ({"epoch": 4, "checkpoints": lambda: ["checkpoint-4"]}, {}, 2),
        ({"epoch": 10}, {}, 0),
        ({}, {"checkpoints_total_limit": 1}, 2),
        ({"epoch": 8, "checkpoints": lambda: ["checkpoint-4", "checkpoint-8"]}, {"checkpoints_total_limit": 2}, 1),
    ],
)
def test_how_much_will_be_written(changes, flags, number):
    run = sized(**flags)
    vars(run).update(changes)
    expected = failures.expected_bytes(run)
    assert expected[f"checkpoints ({number} at a time)"] == number * 4 * 4000 and expected["weights"] == 4000
    run.registered["other"] = SimpleNamespace(state_dict=lambda: {"nested": [torch.zeros(500, dtype=torch.float64)]})
    assert failures.expected_bytes(run)[f"checkpoints ({number} at a time)"] == number * 5 * 4000


def test_the_estimate_is_right(task, tmp_path, monkeypatch):  # noqa: F811
    estimates = []
    monkeypatch.setattr(failures, "check_free_space", lambda run: estimates.append(failures.expected_bytes(run)))
    flags = {"rank": 32, "use_ema": True, "ema_interval": 1}
    out = train("flow_grpo", tmp_path / "run", task, **flags)
    written = sum(file.stat().st_size for file in (out / "checkpoint-1").iterdir())
    assert estimates[0]["checkpoints (1 at a time)"] == pytest.approx(written, rel=0.05)
    assert estimates[0]["weights"] == pytest.approx((out / LORA).stat().st_size, rel=0.05)
    pictures = sum(file.stat().st_size for file in out.rglob("*.png"))
    assert 0 < pictures < 2 * estimates[0]["pictures"]


def test_a_disk_that_is_too_small_is_found_before_training(task, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(10**9, 10**9 - 10**5, 10**5))
    monkeypatch.setattr("diffusers_align.training.report.report.Report.start", full)
    message = r"run has 0.1 MB free, and this run will write about [\d.]+ MB: checkpoints \(3 at a time\) .*weights .*pictures .*--checkpoints_total_limit"
    with pytest.raises(OSError, match=message):
        train("ddpo", tmp_path / "run", task, num_epochs=3)


@pytest.mark.parametrize("place", ["file/run", "/proc/run"])
def test_a_folder_that_cannot_be_written_is_found_before_anything_is_loaded(task, tmp_path, monkeypatch, place):  # noqa: F811
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(Run, "load_policy", None)
    monkeypatch.setattr("diffusers_align.training.report.report.reward_of_flags", None)
    with pytest.raises(OSError, match="Cannot write to --output_dir .*Choose another folder"):
        train("ddpo", tmp_path / place, task)


ERRORS = {
    "file system": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "safetensors": SafetensorError("I/O error: No space left on device"),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_a_disk_that_fills_up_leaves_the_checkpoint_before_it(task, tmp_path, monkeypatch, kind):  # noqa: F811
    write_state = checkpoints.write_state

    def write_until_full(folder, name, state):
        write_state(folder, name, state)
        if (folder.name, name) == (".checkpoint-2.partial", "optimizer"):
            raise ERRORS[kind]

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_state", write_until_full)
        message = "checkpoint after epoch 2 could not be written and is left out: .*checkpoint-1 is complete .1 of 3 epochs.*--resume_from_checkpoint latest"
        with pytest.raises(OSError, match=message):
            train("ddpo", out, task, num_epochs=3)
    assert [p.name for p in out.glob("*checkpoint-*")] == ["checkpoint-1"]
    pipe = DiffusionPipeline.from_pretrained(embedded.path(SCRIPTS["ddpo"]["pretrained_model_name_or_path"]))
    pipe.load_lora_weights(out / "checkpoint-1", weight_name=LORA)
    if kind == "file system":
        train("ddpo", out, task, num_epochs=3, resume_from_checkpoint="latest")
        assert [row["epoch"] for row in rows(out)] == [0, 1, 2]
