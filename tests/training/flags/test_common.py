import importlib.util
import re
from pathlib import Path

import pytest

from diffusers_align import embedded
from diffusers_align.data import load_prompts
from diffusers_align.files.paths import folder
from diffusers_align.rewards import BUILT_INS
from diffusers_align.training.flags import common, options
from diffusers_align.training.flags.common import check_output_dir
from diffusers_align.training.flags.model import EMBEDDED
from diffusers_align.training.flags.old_names import warn
from diffusers_align.training.flags.options import StepIndex, option

SCRIPTS = folder("training_scripts")
RECIPES = sorted((SCRIPTS / "recipes").glob("*.yaml"))
REQUIRED = ["--pretrained_model_name_or_path", "mini-sd", "--prompts", "mini_train", "--reward", "jpeg", "--output_dir", "out"]


class Flags(common.SamplingArguments):
    """a test"""

    window: tuple[StepIndex, StepIndex] | None = option(None, "two steps")


def parse(*argv: str, required=REQUIRED):
    return options.parse(Flags, [*required, *argv], "A test.")


def recipe(tmp_path: Path, text: str) -> list[str]:
    (tmp_path / "recipe.yaml").write_text(text)
    return ["--config", str(tmp_path / "recipe.yaml")]


def message(capsys, *argv: str, required=REQUIRED) -> str:
    """What the parser prints as it exits."""
    with pytest.raises(SystemExit) as exit:
        parse(*argv, required=required)
    assert exit.value.code == 2
    return capsys.readouterr().err


def script_of(recipe: Path):
    """The script whose algorithm's name the recipe's begins with."""
    stems = [path.stem for path in SCRIPTS.glob("train_*.py") if recipe.stem.startswith(path.stem.removeprefix("train_"))]
    assert stems, f"{recipe.name} begins with no script's name"
    return load_script(max(stems, key=len))


def load_script(stem: str):
    spec = importlib.util.spec_from_file_location(stem, SCRIPTS / f"{stem}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# recipes


def test_recipe_replaces_defaults_and_flags_replace_the_recipe(tmp_path):
    config = recipe(tmp_path, "rank: 7\nseed: 5\nuse_ema: true\ngradient_checkpointing: true\n")
    args = parse(*config, "--seed", "6", "--no-use_ema")
    assert (args.rank, args.seed, args.use_ema, args.gradient_checkpointing) == (7, 6, False, True)
    assert args.train_batch_size == parse().train_batch_size == 8
    assert parse().rank == 32


def test_recipe_may_hold_the_required_values(tmp_path):
    config = recipe(tmp_path, "pretrained_model_name_or_path: mini-sd\nprompts: mini_train\nreward: jpeg\noutput_dir: out\n")
    assert parse(*config, required=[]).prompts == "mini_train"


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "'1e-4'"])
def test_every_spelling_of_a_float_is_one(tmp_path, text):
    rate = parse(*recipe(tmp_path, f"learning_rate: {text}\n")).learning_rate
    assert isinstance(rate, float)
    assert rate == 1e-4


def test_recipe_values_get_their_flags_type(tmp_path):
    args = parse(*recipe(tmp_path, "rank: '7'\nlearning_rate: 1\nwindow: [0, 3]\ncall_kwargs: {num_frames: 9}\nguidance_scale: null\nprompt_column: 2024\n"))
    assert (args.rank, args.learning_rate, args.window, args.call_kwargs, args.guidance_scale) == (7, 1.0, (0, 3), {"num_frames": 9}, None)
    assert args.prompt_column == "2024"
    assert parse(*recipe(tmp_path, "call_kwargs: '{\"num_frames\": 9}'\n")).call_kwargs == {"num_frames": 9}


def test_a_list_is_a_comma_separated_value(tmp_path):
    assert parse(*recipe(tmp_path, "lora_layers: [to_q, to_k]\n")).lora_layers == "to_q,to_k"


def test_an_empty_recipe_changes_nothing(tmp_path):
    config = recipe(tmp_path, "# nothing\n")
    differing = {name for name, value in vars(parse(*config)).items() if value != vars(parse())[name]}
    assert differing == {"config"}


def test_yamls_no_is_the_choice_of_that_name(tmp_path):
    # YAML 1.1 reads an unquoted no as false.
    assert parse(*recipe(tmp_path, "mixed_precision: no\n")).mixed_precision == "no"


def test_unknown_keys_of_a_recipe_are_named(tmp_path, capsys):
    error = message(capsys, *recipe(tmp_path, "learning_rat: 1\nrank: 2\nzeal: 3\n"))
    assert "recipe.yaml: unknown keys: learning_rat in line 1" in error and "zeal in line 3" in error


def test_a_value_outside_the_choices_is_an_error_that_lists_them(tmp_path, capsys):
    error = message(capsys, *recipe(tmp_path, "mixed_precision: fp8\n"))
    assert "mixed_precision" in error
    assert "must be one of no, fp16, bf16, got fp8" in error


@pytest.mark.parametrize(
    "text",
    [
        "rank: many",
        "rank: 3.5",
        "rank: true",
        "rank: {a: 1}",
        "mixed_precision: null",
        "learning_rate: fast",
        "window: [0, x]",
        "window: [1]",
        "use_ema: 'false'",
        "call_kwargs: '[1]'",
    ],
)
def test_a_recipes_value_of_the_wrong_type_is_named(tmp_path, capsys, text):
    error = message(capsys, *recipe(tmp_path, text + "\n"))
    assert "recipe.yaml" in error
    assert text.split(":")[0] in error


def test_a_missing_recipe_is_an_error(capsys):
    assert "no recipe 'nowhere.yaml'" in message(capsys, "--config", "nowhere.yaml")


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"rank: 3\nseed: [1\n", "recipe.yaml, line 3: no YAML: "),
        (b"rank: 3\n\x89PNG\xff\xfe", "recipe.yaml: no text in UTF-8 (byte 8); a recipe is a YAML file"),
        (b"hello\n", "recipe.yaml: a recipe is lines of `flag: value`, and this file is none"),
        (b"- rank\n", "a recipe is lines of `flag: value`"),
        (b"seed: 1\nnum_epochs: null\n", "--num_epochs must be a whole number from 1 to 1e9, got null (in "),
        (b"rank: 3\nseed: 1\nrank: 4\n", "recipe.yaml, line 3: rank stands there a second time; first in "),
        (b"config: other.yaml\n", "unknown keys: config in line 1. The keys"),
        (b"rank: 3\nhelp: true\n", "unknown keys: help in line 2. The keys"),
        (b"learning_rat: 1\n", "learning_rat in line 1 (did you mean learning_rate?)"),
        (b"rank: !!python/object/apply:os.getcwd []\n", "recipe.yaml, line 1: rank is no plain value"),
        (b"learning_rate: .nan\n", "--learning_rate must be a number above 0 and at most 10, got nan (in "),
        (b"mixed_precision: bf61\n", "must be one of no, fp16, bf16, got bf61 (did you mean bf16?)"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_a_sentence_with_its_line(tmp_path, capsys, content, expected):
    (tmp_path / "recipe.yaml").write_bytes(content)
    assert expected in message(capsys, "--config", str(tmp_path / "recipe.yaml"))


def test_a_shipped_recipe_goes_by_its_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert load_script("train_ddpo").parse_args(["--config", "ddpo_mini_sd"]).pretrained_model_name_or_path == "mini-sd"
    assert "ddpo_mini_sd" in message(capsys, "--config", "ddpo_mini_sdd")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_parse_with_their_script(path, capsys):
    warn.cache_clear()
    args = script_of(path).parse_args(["--config", str(path)])
    assert "the old name" not in capsys.readouterr().err, "recipes of the package say flags as they are called today"
    offline = getattr(args, "dataset_name", None)  # such scripts need neither reward nor prompts
    assert args.reward in BUILT_INS or (offline and args.reward is None)
    prompts = [args.prompts, getattr(args, "eval_prompts", None)]
    assert all(load_prompts(source) for source in prompts if source)
    assert offline or args.prompts, "what it trains on"
    assert not Path(args.output_dir).is_absolute()
    assert isinstance(args.learning_rate, float)
    assert isinstance(getattr(args, "clip_range", 0.0), float)


# train_reward.py makes a reward rather than aligning a model with one: it has flags of its own.
ALIGNING = sorted(path.stem for path in SCRIPTS.glob("train_*.py") if path.stem != "train_reward")


def test_there_are_recipes_for_every_script():
    assert {script_of(path).__name__ for path in RECIPES} == set(ALIGNING)


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


def test_a_folder_is_no_recipe(tmp_path, capsys):
    assert f"no recipe '{tmp_path}': it is a folder. Name a YAML file in it" in message(capsys, "--config", str(tmp_path))


@pytest.mark.parametrize("below", ["", "/deeper/still"])
def test_an_output_folder_that_is_a_file(tmp_path, below):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="Cannot write to --output_dir .*file is a file. Choose another folder, which is made"):
        check_output_dir(f"{tmp_path / 'file'}{below}")
