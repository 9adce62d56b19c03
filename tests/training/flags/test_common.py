import importlib.util
import re

import pytest
from flag_tools import ALIGNING, REQUIRED, load_script, message, parse

from diffusers_align import embedded
from diffusers_align.training.flags import common
from diffusers_align.training.flags.common import check_output_dir
from diffusers_align.training.flags.model import EMBEDDED

# recipes


@pytest.mark.parametrize("stem", ALIGNING)
def test_an_epoch_of_a_scripts_defaults_divides_into_batches(stem, capsys):
    module = load_script(stem)
    with pytest.raises(SystemExit):
        module.parse_args(["--help"])
    known = capsys.readouterr().out
    values = {"pretrained_model_name_or_path": "mini-sd3", "prompts": "mini_train", "reward": "jpeg_compressibility", "output_dir": "out"}
    values |= {"views": "captions.json", "dataset_name": "pairs"}
    args = module.parse_args([word for name, value in values.items() if f"--{name} " in known for word in (f"--{name}", value)])
    number = getattr(args, "num_samples_per_epoch", None) or getattr(args, "num_prompts_per_epoch", 0) * getattr(args, "group_size", 1)
    assert number % args.train_batch_size == 0


@pytest.mark.parametrize("stem", ALIGNING)
def test_the_help_of_a_script_can_be_printed(stem, capsys):
    with pytest.raises(SystemExit) as exit:
        load_script(stem).parse_args(["--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert all(flag in text for flag in ("--config", "--reward", "--output_dir"))


# flags


def test_an_unknown_flag_is_an_error(capsys):
    assert "unrecognized arguments: --learning_rat 1" in message(capsys, "--learning_rat", "1")


def test_flags_cannot_be_abbreviated(capsys):
    assert "unrecognized arguments" in message(capsys, "--learning", "1")


@pytest.mark.parametrize("missing", range(0, len(REQUIRED), 2), ids=lambda i: REQUIRED[i])
def test_a_missing_required_value_is_named(capsys, missing):
    required = REQUIRED[:missing] + REQUIRED[missing + 2 :]
    assert f"{REQUIRED[missing]} is required" in message(capsys, required=required)


@pytest.mark.parametrize(
    "flag", ["num_inference_steps", "train_batch_size", "num_epochs", "rank", "num_eval_samples", "checkpointing_epochs", "validation_epochs"]
)
def test_counts_must_be_positive(capsys, flag):
    assert re.search(rf"--{flag} must be a whole number from 1 to \w+, got 0 \(on the command line\)", message(capsys, f"--{flag}", "0"))


@pytest.mark.parametrize("rate", ["0", "-1e-4"])
def test_the_learning_rate_must_be_positive(capsys, rate):
    assert f"--learning_rate must be a number above 0 and at most 10, got {rate}" in message(capsys, f"--learning_rate={rate}")


@pytest.mark.parametrize("text", ["[1]", "nonsense", "3"])
def test_call_kwargs_must_be_a_json_object(capsys, text):
    assert "--call_kwargs" in message(capsys, "--call_kwargs", text)
    assert parse("--call_kwargs", '{"num_frames": 9}').call_kwargs == {"num_frames": 9}


@pytest.mark.parametrize("text, expected", [("prompt", "the script gives the pipeline itself"), ("output_type", "itself"), ("height", "use --height")])
def test_call_kwargs_hold_nothing_that_the_script_decides(capsys, text, expected):
    error = message(capsys, "--call_kwargs", f'{{"{text}": 1}}')
    assert f"--call_kwargs holds {text}" in error and expected in error


def test_names_that_are_nearly_right_are_suggested(capsys):
    assert "did you mean --learning_rate?" in message(capsys, "--learning_rat", "1")
    assert "did you mean mini-sd?" in message(capsys, "--pretrained_model_name_or_path", "mini-sdd")
    assert "did you mean cosine?" in message(capsys, "--lr_scheduler", "cosin")
    assert set(EMBEDDED) < set(embedded.NAMES)


# trackers


def test_trackers_are_a_list(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert parse().trackers == []
    assert parse("--report_to", "tensorboard, wandb").trackers == ["tensorboard", "wandb"]


@pytest.mark.parametrize("trackers", ["mlflow", "tensorboard,mlflow"])
def test_an_unknown_tracker_is_an_error_that_lists_the_known(capsys, monkeypatch, trackers):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert "unknown tracker 'mlflow'; choose among none, tensorboard, wandb, trackio" in message(capsys, "--report_to", trackers)


@pytest.mark.parametrize("tracker", common.TRACKERS)
def test_a_tracker_that_is_not_installed_is_an_error_with_the_command(capsys, monkeypatch, tracker):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert f"--report_to {tracker}: not installed. Run `pip install {tracker}`" in message(capsys, "--report_to", tracker)


# the token


def test_a_token_that_a_tracker_would_log_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert "--hub_token would be logged to wandb" in message(capsys, "--push_to_hub", "--hub_token", "secret", "--report_to", "wandb")


@pytest.mark.parametrize("token", [["--hub_token", "secret"], ["--hub_token=secret"]])
def test_the_recorded_command_line_holds_no_token(token):
    command = parse("--push_to_hub", *token, "--rank", "3").command
    assert "secret" not in command
    assert command.startswith("accelerate launch ")
    assert command.endswith("--push_to_hub --rank 3")


# the output folder


def test_the_output_folder_is_made_and_left_empty(tmp_path):
    made = common.check_output_dir(str(tmp_path / "a" / "b"))
    assert made == tmp_path / "a" / "b"
    assert list(made.iterdir()) == []
    (made / "kept").touch()
    common.check_output_dir(str(made))
    assert [path.name for path in made.iterdir()] == ["kept"]


@pytest.mark.parametrize("value, layers", [("to_q, to_k", "to_q,to_k"), ("ff.net.0.proj", "ff.net.0.proj"), ("to_q,,", None), (",", None)])
def test_layers_are_names_with_commas_between_them(value, layers, capsys):
    if layers is None:
        assert "--lora_layers must be names of layers with a comma between two of them, got" in message(capsys, "--lora_layers", value)
    else:
        assert parse("--lora_layers", value).lora_layers == layers


@pytest.mark.parametrize("below", ["", "/deeper/still"])
def test_an_output_folder_that_is_a_file(tmp_path, below):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="Cannot write to --output_dir .*file is a file. Choose another folder, which is made"):
        check_output_dir(f"{tmp_path / 'file'}{below}")
