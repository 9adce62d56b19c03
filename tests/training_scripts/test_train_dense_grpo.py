"""`train_dense_grpo.py`: what it logs, that it resumes, its flags."""

import pytest
import torch
from script_tools import RECIPES, assert_same_lora, assert_same_run, load_script, rows, run_script, run_script_on_two_processes, write_task

from diffusers_align.training.checkpoints.state_files import read_state

FLAGS = {
    "num_prompts_per_epoch": 2,
    "group_size": 2,
    "calibration_rounds": 1,
    "calibration_increment": 0.1,
    "sde_window": (0, 2),
    "gradient_accumulation_steps": 2,
}
FIXED = {name: value for name, value in FLAGS.items() if name != "calibration_increment"} | {"calibration_rounds": 0}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    task = write_task(tmp_path_factory.mktemp("task"))
    return task, run_script("dense_grpo", tmp_path_factory.mktemp("dense") / "run", task, num_epochs=2, **FLAGS)


def test_the_script_trains_and_logs_gains(finished):
    metrics = rows(finished[1])
    assert [row["epoch"] for row in metrics] == [0, 1]
    for row in metrics:
        assert row["ratio_error"] == 0.0 and row["grad_norm"] > 0
        assert {name for name in row if name.startswith("gain/")} == {"gain/0", "gain/1"} and row["gain/0"] != 0 != row["gain/1"]
    assert metrics[0]["kl"] == 0 < metrics[1]["kl"], "one update per epoch: the first starts at the reference"


def test_resumed_equals_uninterrupted_with_the_calibration_of_the_checkpoint(finished, tmp_path, capsys):
    task, expected = finished
    run_script("dense_grpo", tmp_path / "run", task, num_epochs=1, **FLAGS)
    calibrated = [line for line in capsys.readouterr().out.splitlines() if line.startswith("psi after 1 rounds")]
    assert len(calibrated) == 1 and calibrated[0].endswith(", 0.300") and "0.300, 0.300" not in calibrated[0], "the window's steps moved"
    # Another psi_init: what counts is the checkpoint's.
    run_script("dense_grpo", tmp_path / "run", task, num_epochs=2, **FLAGS, psi_init=0.9, resume_from_checkpoint="latest", allow_changes=True)
    assert calibrated[0] in capsys.readouterr().out
    assert_same_run(tmp_path / "run", expected, "checkpoint-2")


def test_each_step_is_trained_on_its_own_advantage(finished, tmp_path, monkeypatch):
    def only_step(k):
        return lambda samples, args, reward, gains: torch.zeros_like(gains).index_fill(1, torch.tensor(k), 1.0)

    for k, trained in ((1, True), (2, False)):  # 2 is behind the window
        monkeypatch.setattr("diffusers_align.training.online.group_advantages.advantages_of", only_step(k))
        out = run_script("dense_grpo", tmp_path / str(k), finished[0], **{**FIXED, "kl_weight": 0, "allow_no_signal": True})
        assert (rows(out)[0]["grad_norm"] > 0) is trained


GAE = {"advantage": "gae", "gae_lambda": 0.5, "value_batch_size": 8, "value_buffer_size": 16, "value_learning_rate": 1e-2, "value_steps": 2}


def test_generalised_advantages_of_gains_resume_bit_for_bit(finished, tmp_path):
    flags = FIXED | GAE
    expected = run_script("dense_grpo", tmp_path / "whole", finished[0], num_epochs=2, **flags)
    metrics = rows(expected)
    assert all(row["ratio_error"] == 0.0 and row["grad_norm"] > 0 and row["value_error"] > 0 and "explained_variance" in row for row in metrics)
    assert metrics[0]["gain/0"] != 0 != metrics[0]["gain/1"]
    run_script("dense_grpo", tmp_path / "run", finished[0], num_epochs=1, **flags)
    run_script("dense_grpo", tmp_path / "run", finished[0], num_epochs=2, **flags, resume_from_checkpoint="latest")
    assert_same_run(tmp_path / "run", expected, "checkpoint-2")
    assert not torch.equal(*(read_state(tmp_path / "run" / f"checkpoint-{n}", "value_baseline")["network"]["head.weight"] for n in (1, 2)))


def test_gains_behind_the_trained_steps_count_for_generalised_advantages(finished, tmp_path):
    """Of the window's two steps one is trained; what the other gains is part of its return."""
    out = run_script("dense_grpo", tmp_path / "run", finished[0], **FIXED | GAE, timestep_fraction=0.4, random_timestep_fraction=1.0)
    assert {name for name in rows(out)[0] if name.startswith("gain/")} == {"gain/0", "gain/1"}


@pytest.mark.parametrize("recipe", ["dense_grpo_sd35", "dense_grpo_mini_sd3"])
def test_recipes_parse(recipe):
    args = load_script("dense_grpo").parse_args(["--config", str(RECIPES / f"{recipe}.yaml")])
    assert args.prompts and args.global_std is False and args.psi_init > 0


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"psi_init": 0}, "--psi_init must be a number above 0"),
        ({"sde_window": (2, 1)}, "--sde_window 2 1 must be a first step and a later end"),
        ({"multi_reward": "gdpo"}, "for each step"),
        ({"advantage": "gae", "baseline": "leave_one_out"}, "--baseline has no effect without --advantage group"),
        ({"value_steps": 3}, "--value_steps has no effect without --advantage"),
        ({"gae_lambda": 0.3}, "--gae_lambda has no effect without --advantage gae"),
    ],
)
def test_flags_that_make_no_sense(finished, tmp_path, capsys, flags, message):
    with pytest.raises((SystemExit, ValueError)) as error:
        run_script("dense_grpo", tmp_path / "run", finished[0], num_epochs=1, **{**FLAGS, **flags})
    assert message in capsys.readouterr().err + str(error.value)


@pytest.mark.long
def test_two_processes_train_what_one_does(tmp_path):
    """Gains, calibration and advantages are of the samples of all processes."""
    task = write_task(tmp_path)
    flags = {
        **FLAGS,
        "num_epochs": 2,
        "train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "seed": 43,  # with which both groups straddle the processes
        "adam_epsilon": 1e-3,  # Adam's first steps have one length, so that rounding would decide where a gradient is nearly 0
    }
    two = run_script_on_two_processes("dense_grpo", tmp_path / "two", task, **flags)
    one = run_script("dense_grpo", tmp_path / "one", task, **flags, reward=f"{task / 'rewards.py'}:recorded")
    assert_same_lora(two, one, rtol=0, atol=1e-5)
    for mine, theirs in zip(rows(two), rows(one)):
        assert mine["ratio_error"] == 0.0 and all(mine[key] == pytest.approx(theirs[key], abs=1e-5) for key in ("reward", "gain/0", "gained/1"))
