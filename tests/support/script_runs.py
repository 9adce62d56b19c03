"""Flow-GRPO and DDPO on the embedded models as small as they get: run, resumed, compared."""

import importlib.util
import json
import os
import signal
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusers_align.training.checkpoints.state_files import read_state

ROOT = Path(__file__).parents[2]


LORA = "pytorch_lora_weights.safetensors"


PROMPTS = [("a cat on a red background", 0.5), ("two dogs on a blue background", 1.0), ("a green apple", 2.0)]


REWARDS = """
import os
from pathlib import Path

import torch


def brightness(images, prompts, weight=None, **columns):
    values = images.flatten(1).mean(1)
    return values * torch.tensor([float(w) for w in weight], device=images.device) if weight else values


def redness(images, prompts, **columns):
    return {"reward": images[:, 0].flatten(1).mean(1), "green": images[:, 1].flatten(1).mean(1)}


def no_dogs(images, prompts, **columns):
    values = images.flatten(1).mean(1)
    return torch.tensor([float("nan") if "dog" in prompt else value for prompt, value in zip(prompts, values.tolist())])


def recorded(images, prompts, **columns):
    (Path(__file__).parent / f"rank-{os.environ.get('RANK', 0)}-of-{os.environ.get('WORLD_SIZE', 1)}").touch()
    return images.flatten(1).mean(1)
"""


COMMON = {
    "num_inference_steps": 3,
    "guidance_scale": 1.0,
    "train_batch_size": 2,
    "rank": 4,
    "learning_rate": 3e-3,
    "num_eval_samples": 4,
    "num_validation_images": 3,
    "checkpointing_epochs": 1,
}


SCRIPTS = {
    "flow_grpo": {
        "pretrained_model_name_or_path": "mini-sd3",
        "call_kwargs": '{"max_sequence_length": 1}',
        "num_prompts_per_epoch": 2,
        "group_size": 2,
    },
    "ddpo": {"pretrained_model_name_or_path": "mini-sd", "num_samples_per_epoch": 4},
}


# What the uninterrupted and the resumed runs are made of: everything that has a state of its own.
STATEFUL = {
    "flow_grpo": {"use_ema": True, "ema_interval": 1, "kl_form": "gaussian", "lr_scheduler": "linear", "lr_warmup_steps": 6, "report_to": "tensorboard"},
    "ddpo": {
        "per_prompt_stat_min_count": 2,
        "per_prompt_stat_buffer_size": 4,
        "random_timestep_fraction": 0.7,
        "lr_scheduler": "constant_with_warmup",
        "lr_warmup_steps": 6,
    },
}


def script(name):
    return ROOT / "training_scripts" / f"train_{name}.py"


def arguments(name, out, task, **flags):
    """The command line: True is a bare flag, None is left out."""
    reward = {"prompts": task / "prompts.jsonl", "reward": f"{task / 'rewards.py'}:brightness"}
    values = {**COMMON, **SCRIPTS[name], **reward, "output_dir": out, "num_epochs": 1, "validation_epochs": 10, **flags}
    return [word for key, value in values.items() if value is not None for word in (f"--{key}", *([] if value is True else [str(value)]))]


def train(name, out, task, **flags):
    spec = importlib.util.spec_from_file_location(f"train_{name}", script(name))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(arguments(name, out, task, **flags))
    return out


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_lora(actual, expected, **tolerance):
    actual, expected = load_file(actual / LORA), load_file(expected / LORA)
    assert actual.keys() == expected.keys() and len(actual) > 0
    for name, value in expected.items():
        if tolerance:
            torch.testing.assert_close(actual[name], value, **tolerance)
        else:
            assert torch.equal(actual[name], value), name


def assert_same_state(actual, expected):
    if isinstance(expected, torch.Tensor):
        assert torch.equal(actual, expected)
    elif isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key, value in expected.items():
            assert_same_state(actual[key], value)
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for mine, theirs in zip(actual, expected):
            assert_same_state(mine, theirs)
    else:
        assert actual == expected


def assert_same_run(actual, expected, last):
    """Bit for bit: weights, metrics, pictures, and whatever the last checkpoint holds (average, statistics, optimizer, schedule)."""
    assert (actual / "metrics.jsonl").read_text() == (expected / "metrics.jsonl").read_text()
    assert_same_lora(actual, expected)
    assert (actual / "before_after.png").read_bytes() == (expected / "before_after.png").read_bytes()
    states = json.loads((expected / last / "manifest.json").read_text())["states"]
    assert {"run", "weights", "optimizer", "schedule"} <= set(states)
    for name in states:
        assert_same_state(*(read_state(folder / last, name) for folder in (actual, expected)))


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A folder with prompts, with a column for the reward, and rewards."""
    folder = tmp_path_factory.mktemp("task")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text, "weight": weight}) + "\n" for text, weight in PROMPTS))
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def draw(pipe, name):
    call = json.loads(SCRIPTS[name].get("call_kwargs", "{}"))
    generator = torch.Generator().manual_seed(3)
    return pipe(PROMPTS[0][0], num_inference_steps=3, guidance_scale=1.0, generator=generator, output_type="pt", **call).images


ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "ACCELERATE_USE_CPU": "true",
    "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'support'}",
    "HF_HUB_OFFLINE": "1",
}


@contextmanager
def started(command, log):
    """A process with its output in a file; it and its children are killed at the end, if still there."""
    with log.open("w") as file:
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
