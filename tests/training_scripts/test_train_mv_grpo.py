"""`train_mv_grpo.py`: with a captioner, resumed, its flags."""

import json

import pytest
import torch
from captioner import CAPTIONER
from script_runs import PROMPTS
from script_tools import RECIPES, assert_same_lora, assert_same_run, load_script, rows, run_script, run_script_on_two_processes, write_task

FLAGS = {"num_prompts_per_epoch": 2, "group_size": 2, "num_views": 1, "kl_weight": 0.1, "sde_window": (0, 2), "gradient_accumulation_steps": 2}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    task = write_task(tmp_path_factory.mktemp("task"))
    (task / "captioner.py").write_text(CAPTIONER)
    views = f"{task / 'captioner.py'}:by_brightness"
    return task, run_script("mv_grpo", tmp_path_factory.mktemp("mv") / "run", task, num_epochs=2, views=views, posterior_views=True, **FLAGS)


def test_the_script_trains_with_a_posterior_captioner(finished):
    metrics = rows(finished[1])
    assert [row["epoch"] for row in metrics] == [0, 1]
    for row in metrics:
        assert row["ratio_error"] == 0.0 and row["grad_norm"] > 0 and row["reward/view"] > 0
    assert metrics[0]["kl"] == 0 < metrics[1]["kl"], "under each view, the first update starts at the reference"


def test_resumed_equals_uninterrupted(finished, tmp_path):
    task, expected = finished
    flags = {**FLAGS, "views": f"{task / 'captioner.py'}:by_brightness", "posterior_views": True}
    run_script("mv_grpo", tmp_path / "run", task, num_epochs=1, **flags)
    run_script("mv_grpo", tmp_path / "run", task, num_epochs=2, resume_from_checkpoint="latest", **flags)
    assert_same_run(tmp_path / "run", expected, "checkpoint-2")


def test_other_captions_in_the_file_are_another_run(finished, tmp_path):
    views, flags = tmp_path / "views.json", {**FLAGS, "kl_weight": 0, "num_eval_samples": 1, "num_validation_images": 1}
    views.write_text(json.dumps({text: ["first"] for text, _ in PROMPTS}))
    run_script("mv_grpo", tmp_path / "run", finished[0], num_epochs=1, views=views, **flags)
    views.write_text(json.dumps({text: ["second"] for text, _ in PROMPTS}))
    with pytest.raises(ValueError, match=r"--views: the content of .*views.json is another one"):
        run_script("mv_grpo", tmp_path / "run", finished[0], num_epochs=2, views=views, resume_from_checkpoint="latest", **flags)


def test_each_view_is_trained_on_its_own_advantage(finished, tmp_path, monkeypatch):
    def only_view(samples, args, reward, rewards):
        return torch.zeros_like(rewards).index_fill(1, torch.tensor(1), 1.0)

    monkeypatch.setattr("diffusers_align.training.online.group_advantages.advantages_of", only_view)
    views = f"{finished[0] / 'captioner.py'}:rewritten"
    assert rows(run_script("mv_grpo", tmp_path / "run", finished[0], views=views, **{**FLAGS, "kl_weight": 0}))[0]["grad_norm"] > 0


@pytest.mark.parametrize("recipe", ["mv_grpo_flux", "mv_grpo_mini_sd3"])
def test_recipes_parse(recipe):
    args = load_script("mv_grpo").parse_args(["--config", str(RECIPES / f"{recipe}.yaml")])
    assert args.prompts and args.views and args.global_std is False


def test_a_prompt_without_views_is_named_before_anything_is_loaded(finished, tmp_path):
    (tmp_path / "views.json").write_text(json.dumps({"a cat on a red background": ["a red cat"], "a green apple": ["an apple"]}))
    with pytest.raises(ValueError, match="views.json has to give a list of at least 1 captions for the prompt 'two dogs on a blue background'"):
        run_script("mv_grpo", tmp_path / "run", finished[0], views=tmp_path / "views.json", **FLAGS)


@pytest.mark.parametrize("flags, message", [({}, "--views is required"), ({"views": "x.json", "num_views": 0}, "--num_views must be a whole number from 1")])
def test_flags_that_make_no_sense(finished, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit):
        run_script("mv_grpo", tmp_path / "run", finished[0], **{**FLAGS, **flags})
    assert message in capsys.readouterr().err


@pytest.mark.long
def test_two_processes_train_what_one_does(tmp_path):
    """A captioner sees its whole group, whichever processes have its images."""
    task = write_task(tmp_path)
    (task / "captioner.py").write_text(CAPTIONER)
    flags = {
        **FLAGS,
        "num_epochs": 2,
        "train_batch_size": 1,
        "seed": 43,
        "views": f"{task / 'captioner.py'}:by_brightness",
        "posterior_views": True,
    }  # with this seed, both groups straddle the processes
    two = run_script_on_two_processes("mv_grpo", tmp_path / "two", task, **flags)
    one = run_script("mv_grpo", tmp_path / "one", task, **flags, reward=f"{task / 'rewards.py'}:recorded")
    assert_same_lora(two, one, rtol=0, atol=1e-5)
    for mine, theirs in zip(rows(two), rows(one)):
        assert mine["ratio_error"] == 0.0 and all(mine[key] == pytest.approx(theirs[key], abs=1e-5) for key in ("reward", "reward/view", "reward_std"))
