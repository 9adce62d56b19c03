"""`diffusers-align plan`."""

import re

import pytest
from shallow_models import shallow as shallow

from diffusers_align.__main__ import main
from diffusers_align.plan import plan, report
from diffusers_align.plan.command import memory
from diffusers_align.plan.steps import FAMILIES, stages
from tests.families.cases import CASES


def test_a_cards_memory_is_read():
    assert memory("24GB") == memory(" 24 GiB") == 24 * 2**30 and memory("512MB") == 2**29
    for text in ("24", "GB", "-1GB", "0GB", "24 apples"):
        with pytest.raises(ValueError, match="such as 24GB"):
            memory(text)


@pytest.mark.slow
def test_the_command_prints_a_plan(capsys):
    main(["plan", "--config", "dpo_mini_sd3", "--gpu", "24GB", "--train_batch_size", "2", "--num_samples_per_epoch", "4"])
    printed = capsys.readouterr().out
    assert "train_dpo on mini-sd3, --train_batch_size 2" in printed and "Computed, not measured" in printed
    assert re.search(r"Fits: \d\d\.\d MB within 21\.60 GB", printed)


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "A plan is of a recipe"),
        (["--config", "spo_mini_sd3"], "No plan is known for train_spo.py; there is one for train_adjoint_matching, "),
        (["--script", "train_reward"], "No plan is known for train_reward.py"),
        (["--script", "evaluate.py"], "No plan is known for evaluate.py"),
        (["--script", "train_d3po"], "No plan is known for train_d3po.py"),
        (["--config", "dpo_mini_sd3", "--num_samples_per_epoch", "16", "--train_batch_size", "7"], "do not divide into batches of 7"),
        (["--config", "ddpo_mini_sd", "--update", "trpo"], "knows --update adamw alone"),
        (["--config", "ddpo_mini_sd", "--gpu", "big"], "such as 24GB"),
        (["--config", "ddpo_sd15", "--pretrained_model_name_or_path", "someone/else"], "hf download someone/else"),
        (["--config", "ddpo_mini_sd", "--no_such_flag", "1"], "unrecognized arguments: --no_such_flag"),
        (["--config", "no_such_recipe"], "no recipe 'no_such_recipe'"),
        (["--config"], "--config needs the name or the file of a recipe"),
        (["--script", "train_ddpo", "--config"], "--config needs the name or the file of a recipe"),
    ],
)
def test_what_no_plan_can_be_made_of_is_said(argv, message, capsys):
    with pytest.raises(SystemExit):
        main(["plan", *argv])
    assert message in capsys.readouterr().err


@pytest.mark.long
def test_a_script_needs_no_recipe_and_flags_that_are_not_looked_at_may_be_left_out(shallow):  # noqa: F811
    small = {
        "pretrained_model_name_or_path": shallow["mini-sd3"],
        "num_samples_per_epoch": 2,
        "train_batch_size": 2,
        "call_kwargs": {"max_sequence_length": 1},
    }
    made = plan(script="train_dpo.py", **small, shard_denoiser=True)
    assert made.rows == (4, 4) and made.fits is None and made.stored == 0
    assert "fragments, what --shard_denoiser changes." in report(made)
    inverted = plan(script="train_dpo", **small, inversion_steps=3)
    assert inverted.rows == (4 + 2 * 2 * 3, 4) and inverted.flops > made.flops and inverted.stored == 0, "two sides of two pairs, three times each"


def test_families_are_scripts():
    from diffusers_align.files.paths import names

    assert set(FAMILIES) <= set(names("training_scripts"))
    with pytest.raises(ValueError, match="A script of the same kind"):
        stages("train_spo", None)


def test_a_pipeline_that_encodes_no_pictures_is_told_as_the_run_tells_it(tmp_path):
    case = CASES["Kandinsky3Pipeline"][0]
    case.build().save_pretrained(tmp_path)
    sizes = {name: case.call[name] for name in ("height", "width", "num_inference_steps")}
    with pytest.raises(ValueError, match="Kandinsky3Pipeline has no autoencoder that encodes"):
        plan(script="train_dpo", pretrained_model_name_or_path=str(tmp_path), num_samples_per_epoch=2, train_batch_size=2, **sizes)
