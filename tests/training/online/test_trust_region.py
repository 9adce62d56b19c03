"""Training by trust-region steps."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[3]


# training


REWARDS = """
def redness(images, prompts, **columns):
    return (images[:, 0] - images[:, 2]).flatten(1).mean(1)
"""
FLAGS = {
    "pretrained_model_name_or_path": "mini-sd",
    "update": "trpo",
    "num_epochs": 2,
    "num_samples_per_epoch": 4,
    "train_batch_size": 2,
    "num_inference_steps": 3,
    "guidance_scale": 1.0,
    "rank": 2,
    "cg_iterations": 3,
    "max_kl": 0.05,
    "num_eval_samples": 2,
    "num_validation_images": 2,
    "validation_epochs": 10,
    "checkpointing_epochs": 10,
}


def load_script():
    spec = importlib.util.spec_from_file_location("train_ddpo", ROOT / "training_scripts" / "train_ddpo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arguments(folder, **flags):
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "prompts.txt").write_text("a red cat\na blue dog\na green apple\n")
    values = {**FLAGS, "prompts": folder / "prompts.txt", "reward": f"{folder / 'rewards.py'}:redness", "output_dir": folder / "run", **flags}
    return [word for key, value in values.items() if value is not None for word in (f"--{key}", *([] if value is True else [str(value)]))]


def results(folder):
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return rows, load_file(folder / "run" / "pytorch_lora_weights.safetensors")


def train(folder, **flags):
    load_script().main(arguments(folder, **flags))
    return results(folder)


def assert_same_steps(actual, expected):
    for name, value in expected[1].items():
        torch.testing.assert_close(actual[1][name], value, rtol=0, atol=1e-5)
    # Products with an ill-conditioned Fisher matrix lie between a gradient's rounding and the step's KL.
    for mine, theirs in zip(actual[0], expected[0], strict=True):
        assert mine["kl"] == pytest.approx(theirs["kl"], rel=1e-2) and mine["backtracks"] == theirs["backtracks"]
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3) and mine["ess"] == pytest.approx(theirs["ess"], rel=1e-2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp("trpo"))


def test_a_resumed_run_may_have_batches_of_another_size(tmp_path, capsys):
    train(tmp_path, num_epochs=1)
    rows, _ = train(tmp_path, train_batch_size=4, resume_from_checkpoint="latest")
    assert len(rows) == 2 and "Changed without effect on what is learned: --train_batch_size was 2, now 4." in capsys.readouterr().out


def test_an_epoch_is_one_step_for_the_moving_average_as_well(tmp_path):
    """Two batches of an epoch would be two steps of another update."""
    with pytest.raises(ValueError, match="--ema_interval 3 optimizer steps, and the run makes 2: the average would never begin"):
        train(tmp_path, use_ema=True, ema_interval=3)


def test_the_script_takes_trust_region_steps(trained):
    rows, lora = trained
    assert len(rows) == 2
    for row in rows:
        assert row["ratio_error"] == 0.0, "the replay is the rollout, bit for bit"
        assert row["accepted"] == 1 and 0.01 < row["kl"] <= 0.05 * (1 + 1e-6)
        assert row["improvement"] > 0.1 * row["expected_improvement"] > 0
        assert 0.25 <= row["ess"] < 1 and row["cg_residual"] > 0 and row["grad_norm"] > 0
        assert "lr" not in row
    assert max(value.abs().max() for name, value in lora.items() if "lora.up" in name or "lora_B" in name) > 1e-5


def test_micro_batches_do_not_change_the_step(trained, tmp_path):
    assert_same_steps(train(tmp_path, train_batch_size=4), trained)


def test_the_radius_grows_with_the_latents(tmp_path, capsys):
    """4 x 16 x 16 dimensions, each with 0.02 nats."""
    rows, _ = train(tmp_path, max_kl=None, num_epochs=1)
    assert "--max_kl is 20.48 nats, 0.02 for each of the 1024 dimensions" in capsys.readouterr().out
    assert rows[0]["accepted"] == 1 and 1 < rows[0]["kl"] <= 20.48 * (1 + 1e-6)


@pytest.mark.long
def test_two_processes_take_the_step_of_one(trained, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(ROOT / "training_scripts" / "train_ddpo.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*launch, *arguments(tmp_path)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_steps(results(tmp_path), trained)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--mixed_precision", "fp16"], "bf16"),
        (["--random_timestep_fraction", "0.5"], "--random_timestep_fraction at 1"),
        (["--compile"], "leave out --compile"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, message, capsys):
    required = ["--pretrained_model_name_or_path", "mini-sd", "--prompts", "p", "--reward", "r", "--output_dir", "o", "--update", "trpo"]
    with pytest.raises(SystemExit):
        load_script().parse_args([*required, *flags])
    assert message in capsys.readouterr().err
