"""Runs a training script on the embedded mini-sd3 with tiny numbers: in process, or on two processes."""

import importlib.util
import json
import subprocess
import sys

from pydantic import ConfigDict
from script_runs import COMMON, PROMPTS, REWARDS, assert_same_lora, assert_same_run, rows, script, started

from diffusers_align.training.flags.common import SamplingArguments
from diffusers_align.training.run.run import Run

RECIPES = script("any").parent / "recipes"
__all__ = [
    "RECIPES",
    "assert_same_lora",
    "assert_same_run",
    "load_script",
    "make_run",
    "rows",
    "run_script",
    "load_make_preferences",
    "run_script_on_two_processes",
    "write_task",
]


def write_task(folder):
    """A folder with prompts, with a column for the reward, and rewards."""
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text, "weight": weight}) + "\n" for text, weight in PROMPTS))
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def arguments(out, task, **flags):
    """The command line; True is a bare flag, a tuple several values."""
    model = {"pretrained_model_name_or_path": "mini-sd3", "call_kwargs": '{"max_sequence_length": 1}'}
    reward = {"prompts": task / "prompts.jsonl", "reward": f"{task / 'rewards.py'}:brightness"}
    argv = []
    for key, value in {**COMMON, **model, **reward, "output_dir": out, "num_epochs": 1, "validation_epochs": 10, **flags}.items():
        values = [] if value is True else value if isinstance(value, tuple) else [value]
        argv += [f"--{key}", *map(str, values)]
    return argv


class AnyArguments(SamplingArguments):
    """The flags that every script has, and any others, unchecked."""

    model_config = ConfigDict(extra="allow")


def make_run(folder, command="", **flags):
    """A run without a script, for the library's functions; `flags` join those that every script has."""
    required = {"pretrained_model_name_or_path": "mini-sd3", "prompts": "mini_train", "reward": "jpeg_compressibility", "output_dir": str(folder)}
    defaults = SamplingArguments(**required, train_batch_size=2)
    args = AnyArguments.model_construct(**{**dict(defaults), **flags})
    args._command = command
    return Run(args, "Test")


def load_script(name):
    """`training_scripts/train_<name>.py` as a module."""
    spec = importlib.util.spec_from_file_location(f"train_{name}", script(name))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(name, out, task, **flags):
    """Run it. Returns its output folder."""
    load_script(name).main(arguments(out, task, **flags))
    return out


def run_script_on_two_processes(name, out, task, **flags):
    """The same on two processes. The task's reward `recorded` leaves a file for each of them, by which they are counted."""
    flags |= {"reward": f"{task / 'rewards.py'}:recorded"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script(name))]
    log = task / f"{name}.log"
    with started([*launch, *arguments(out, task, **flags)], log) as process:
        try:
            process.wait(300)
        except subprocess.TimeoutExpired:
            process.terminate()  # so that it ends its workers, which are in sessions of their own
            process.wait(30)
    assert process.returncode == 0, log.read_text()[-3000:]
    assert {"rank-0-of-2", "rank-1-of-2"} <= {path.name for path in task.glob("rank-*")}
    return out


def load_make_preferences():
    """`training_scripts/make_preferences.py` as a module."""
    path = script("any").parent / "make_preferences.py"
    spec = importlib.util.spec_from_file_location("make_preferences", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
