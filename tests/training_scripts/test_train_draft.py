"""The scripts that differentiate the reward: what they learn, that they resume exactly."""

import pytest
import torch
from diffusers import DiffusionPipeline
from script_runs import LORA
from script_tools import RECIPES, assert_same_lora, assert_same_run, load_script, rows, run_script, run_script_on_two_processes, write_task
from tiny_pipelines import FAMILIES

from diffusers_align import embedded
from diffusers_align.gradients.check import GradientError
from diffusers_align.rewards import InvalidReward
from diffusers_align.training.gradient import epoch_log

FLAGS = {"num_samples_per_epoch": 4, "num_epochs": 2, "learning_rate": 1e-3}
STATEFUL = {**FLAGS, "truncation": 2, "kl_weight": 0.1, "grad_clip_quantile": 0.5, "use_ema": True, "ema_interval": 1}
MINI_SD = {"pretrained_model_name_or_path": "mini-sd", "call_kwargs": "{}"}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return write_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def finished(task):
    """DRaFT-2 with everything that has a state of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(epoch_log, "MIN_NORMS", 2)
        return run_script("draft", task / "run", task, **{**STATEFUL, "num_epochs": 3})


# --- the scripts ---------------------------------------------------------------------------------------------------------


def test_a_run_and_its_lora(finished):
    metrics = rows(finished)
    assert [row["epoch"] for row in metrics] == [0, 1, 2]
    assert all(row["grad_norm"] > 0 and 0 < row["reward"] < 2 for row in metrics)
    assert 0 <= metrics[0]["kl"] < metrics[-1]["kl"]
    assert (finished / "reward_curve.png").is_file() and (finished / "before_after.png").is_file()
    pipeline = DiffusionPipeline.from_pretrained(embedded.path("mini-sd3"))
    call = {"num_inference_steps": 2, "guidance_scale": 1.0, "max_sequence_length": 1, "output_type": "latent"}
    before = pipeline("a cat", generator=torch.Generator().manual_seed(0), **call).images
    pipeline.load_lora_weights(finished, weight_name=LORA)
    assert not torch.equal(pipeline("a cat", generator=torch.Generator().manual_seed(0), **call).images, before)


def test_resumed_equals_uninterrupted(finished, task, tmp_path, monkeypatch):
    monkeypatch.setattr(epoch_log, "MIN_NORMS", 2)
    run_script("draft", tmp_path / "run", task, **STATEFUL)
    run_script("draft", tmp_path / "run", task, **{**STATEFUL, "num_epochs": 3, "resume_from_checkpoint": "latest"})
    assert_same_run(tmp_path / "run", finished, "checkpoint-3")


METHODS = {
    "draft_lv": ("draft", {"method": "draft_lv", "num_renoised": 1}),
    "drtune": ("draft", {"method": "drtune", "num_trained_steps": 2, "skip_last_steps": 1}),
    "srpo": ("draft", {"method": "srpo", "reward_map": "hinge", "reward_target": 3.0, **MINI_SD}),
    "adjoint": ("draft", {"method": "draft", "adjoint": True}),
    "hinge": ("draft", {"reward_map": "hinge", "reward_target": 5.0}),
    "refl": ("refl", {"window": (0.3, 0.9), "reward_target": 5.0, "reward_scale": 1.0}),
    "alignprop": ("alignprop", {"truncation_schedule": "uniform", "reward_scale": 1.0, "kl_weight": 0.1, **MINI_SD}),
    "vader": ("vader", {"backprop_mode": "random", "gradient_checkpointing": True, **MINI_SD}),
}
LOGGED = {"srpo": "penalty", "drtune": "stop_step", "adjoint": "mismatch", "alignprop": "truncation", "vader": "truncation"}
LOGGED |= dict.fromkeys(("refl", "hinge"), "hinge_inactive")


@pytest.mark.parametrize("name", METHODS)
def test_each_method_trains(name, task, tmp_path):
    script, flags = METHODS[name]
    run_script(script, tmp_path / "run", task, **{**FLAGS, "num_eval_samples": 2, "num_validation_images": 2, **flags})
    metrics = rows(tmp_path / "run")
    assert len(metrics) == 2 and all(row["grad_norm"] > 0 and LOGGED.get(name, "reward") in row for row in metrics)
    assert (tmp_path / "run" / LORA).is_file()


def test_the_reward_rises(task, tmp_path):
    """Brightness, which needs no more than an offset."""
    (task / "plain.py").write_text("def plain(images, prompts, **columns):\n    return images.flatten(1).mean(1)\n")
    run_script(
        "draft", tmp_path / "run", task, **{**FLAGS, "num_epochs": 4, "learning_rate": 3e-3, "num_eval_samples": 2, "reward": f"{task / 'plain.py'}:plain"}
    )
    metrics = rows(tmp_path / "run")
    assert metrics[-1]["reward"] > metrics[0]["reward"] + 0.02


def test_a_reward_without_a_gradient_stops_before_training(task, tmp_path):
    with pytest.raises(GradientError, match="reward"):
        run_script("refl", tmp_path / "run", task, **{**FLAGS, "reward": "jpeg_compressibility"})
    assert not list((tmp_path / "run").glob("checkpoint-*")) and not (tmp_path / "run" / "metrics.jsonl").is_file()


@pytest.mark.parametrize(
    "script, flags, message",
    [
        ("draft", ["--reward_map", "hinge"], "needs --reward_target"),
        ("draft", ["--reward_target", "1"], "--reward_target has no effect without --reward_map hinge or distance or shortfall"),
        ("draft", ["--adjoint", "--kl_weight", "1"], "--adjoint is for"),
        ("draft", ["--method", "srpo", "--kl_weight", "1"], "none to hold"),
        ("draft", ["--eta", "1"], "--eta has no effect without --stochastic"),
        ("draft", ["--grad_clip_quantile", "0"], "grad_clip_quantile"),
        ("refl", ["--window", "0.9", "0.1"], "in order"),
    ],
)
def test_flags_that_make_no_sense(script, flags, message, tmp_path, capsys):
    required = ["--pretrained_model_name_or_path", "mini-sd", "--prompts", "mini_train", "--reward", "clip_score", "--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit):
        load_script(script).parse_args([*required, *flags])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flags, expected", [([], ("hinge", 0.7)), (["--reward_map", "none"], ("none", None)), (["--reward_target", "0.5"], ("hinge", 0.5))])
def test_srpo_has_the_official_map_unless_another_is_asked_for(flags, expected, tmp_path):
    required = ["--pretrained_model_name_or_path", "mini-sd", "--prompts", "mini_train", "--reward", "clip_score", "--output_dir", str(tmp_path)]
    args = load_script("draft").parse_args([*required, "--method", "srpo", *flags])
    assert (args.reward_map, args.reward_target) == expected


def test_a_name_of_the_last_version_is_taken(tmp_path, capsys):
    required = ["--pretrained_model_name_or_path", "mini-sd", "--prompts", "mini_train", "--reward", "clip_score", "--output_dir", str(tmp_path)]
    args = load_script("draft").parse_args([*required, "--method", "drtune", "--early_stop", "2"])
    assert args.skip_last_steps == 2 and "--early_stop is now called --skip_last_steps" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", sorted(p.stem for script in ("draft", "refl", "alignprop", "vader") for p in RECIPES.glob(f"{script}_*.yaml")))
def test_recipes_are_read(recipe, tmp_path):
    args = load_script(recipe.split("_")[0]).parse_args(["--config", str(RECIPES / f"{recipe}.yaml"), "--output_dir", str(tmp_path)])
    assert args.num_samples_per_epoch % (args.train_batch_size * args.gradient_accumulation_steps) == 0
    assert args.eval_reward and args.eval_reward != args.reward


@pytest.mark.slow
def test_videos(task, tmp_path):
    family = FAMILIES["wan"]
    family.build().save_pretrained(tmp_path / "wan")
    call = {"pretrained_model_name_or_path": tmp_path / "wan", "call_kwargs": '{"num_frames": 5, "max_sequence_length": 32}', "height": 16, "width": 16}
    flags = {**call, "guidance_scale": 3.0, "frames": "random", "stochastic": True, "backprop_mode": "random"}
    run_script("vader", tmp_path / "run", task, **{**FLAGS, "train_batch_size": 1, **flags})
    assert all(row["grad_norm"] > 0 for row in rows(tmp_path / "run"))


@pytest.mark.long
def test_two_processes_train_what_one_does(task, tmp_path):
    flags = {**FLAGS, "method": "drtune", "num_trained_steps": 1, "skip_last_steps": 2, "adam_epsilon": 1e-3}
    flags |= {"train_batch_size": 2, "gradient_accumulation_steps": 1}
    run_script_on_two_processes("draft", task / "two", task, **flags)
    run_script("draft", tmp_path / "one", task, **{**flags, "reward": f"{task / 'rewards.py'}:recorded"})
    assert_same_lora(task / "two", tmp_path / "one", rtol=1e-3, atol=1e-6)
    assert rows(tmp_path / "one")[-1]["reward"] == pytest.approx(rows(task / "two")[-1]["reward"], abs=1e-4)


# --- what they share -----------------------------------------------------------------------------------------------------


MASKED = """
def dogless(images, prompts, **columns):
    dogs = images.new_tensor([0.0 if "dog" in prompt or "apple" in prompt else 1.0 for prompt in prompts])
    return images.flatten(1).mean(1) * dogs / dogs


with_gradient = []


def never(images, prompts, **columns):
    if images.requires_grad:
        with_gradient.append(len(prompts))  # the check before training, then the training
    return images.flatten(1).mean(1) * (1.0 if len(with_gradient) < 2 else float("nan"))


def nowhere(images, prompts, **columns):
    return images.flatten(1).mean(1) * float("nan")
"""
MASK = {"invalid_rewards": "mask", "num_eval_samples": 2, "num_validation_images": 2, "num_epochs": 1}


@pytest.mark.parametrize("name", ["draft_lv", "refl", "adjoint"])
def test_masked_samples_do_not_stop_a_run(name, task, tmp_path, capsys):
    (task / "masked.py").write_text(MASKED)
    script, flags = METHODS[name]
    run_script(script, tmp_path / "run", task, **{**FLAGS, **flags, **MASK, "reward": f"{task / 'masked.py'}:dogless"})
    (row,) = rows(tmp_path / "run")
    assert row["grad_norm"] > 0 and 0 < row["reward"] < 1
    left_out = int(row["invalid_rewards"])
    assert 0 < left_out < 4 and f"'dogless' has no score for {left_out} of 4 samples. Prompts: " in capsys.readouterr().out


@pytest.mark.parametrize("reward, message", [("never", "no score for 4 of 4 samples. Prompts: 'two dogs"), ("nowhere", "Nothing is left to train on|NaN")])
def test_an_epoch_without_any_reward_stops_the_run(reward, message, task, tmp_path):
    (task / "masked.py").write_text(MASKED)
    with pytest.raises(InvalidReward, match=message):
        run_script("draft", tmp_path / "run", task, **{**FLAGS, **MASK, "reward": f"{task / 'masked.py'}:{reward}"})
