"""`train_adjoint_matching.py`: it learns, resumes, and its options."""

import pytest
from script_tools import RECIPES, assert_same_lora, assert_same_run, load_script, rows, run_script, run_script_on_two_processes, write_task

FLAGS = {"num_prompts_per_epoch": 4, "reward_scale": 300, "last_steps": 1, "random_steps": 1, "num_inference_steps": 4, "learning_rate": 1e-4}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return write_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def finished(task):
    return run_script("adjoint_matching", task / "run", task, num_epochs=3, use_ema=True, ema_interval=1, **FLAGS)


def test_the_script_learns(finished):
    metrics = rows(finished)
    assert [row["epoch"] for row in metrics] == [0, 1, 2]
    assert metrics[0]["residual"] == 1.0 and metrics[0]["kl"] == 0.0 and metrics[0]["masked"] == 0.0
    assert all(row["grad_norm"] > 0 and row["gradient"] > 0 for row in metrics) and metrics[-1]["kl"] > 0


def test_resumed_equals_uninterrupted(finished, task, tmp_path):
    flags = {**FLAGS, "use_ema": True, "ema_interval": 1}
    run_script("adjoint_matching", tmp_path / "run", task, num_epochs=2, **flags)
    run_script("adjoint_matching", tmp_path / "run", task, num_epochs=3, resume_from_checkpoint="latest", **flags)
    assert_same_run(tmp_path / "run", finished, "checkpoint-3")


def test_the_options(task, tmp_path):
    flags = {**FLAGS, "pretrained_model_name_or_path": "mini-sd", "call_kwargs": "{}", "guidance_scale": 3.0, "cfg": "trajectories"}
    run_script("adjoint_matching", tmp_path / "run", task, smoothing_copies=2, loss_clip=1e-12, allow_no_signal=True, **flags)
    assert rows(tmp_path / "run")[0]["masked"] == 1.0 and rows(tmp_path / "run")[0]["grad_norm"] == 0.0


def test_a_reward_without_a_gradient_stops_before_training(task, tmp_path):
    (task / "flat.py").write_text("def flat(images, prompts, **columns):\n    return images.detach().flatten(1).mean(1)\n")
    with pytest.raises(ValueError, match="The images have a graph, the reward has none"):
        run_script("adjoint_matching", tmp_path / "run", task, **{**FLAGS, "reward": f"{task / 'flat.py'}:flat"})
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.parametrize("name", ["adjoint_matching_sd35", "adjoint_matching_mini_sd3", "adjoint_matching_mini_sd"])
def test_recipes_are_read(name, tmp_path):
    args = load_script("adjoint_matching").parse_args(["--config", str(RECIPES / f"{name}.yaml"), "--output_dir", str(tmp_path)])
    assert args.reward_scale > 0 and args.cfg == "none"


@pytest.mark.long
def test_two_processes_train_what_one_does(task, tmp_path):
    flags = {**FLAGS, "num_epochs": 2, "train_batch_size": 1, "random_steps": 2, "adam_epsilon": 1e-3}
    run_script_on_two_processes("adjoint_matching", task / "two", task, **flags)
    run_script("adjoint_matching", tmp_path / "one", task, **{**flags, "reward": f"{task / 'rewards.py'}:recorded"})
    assert_same_lora(task / "two", tmp_path / "one", rtol=1e-3, atol=1e-6)
    assert rows(tmp_path / "one")[-1]["reward"] == pytest.approx(rows(task / "two")[-1]["reward"], abs=1e-4)
