"""Recipes: defaults from YAML, as the flags would have them."""

from pathlib import Path

import pytest
from flag_tools import ALIGNING, SCRIPTS, load_script, message, parse, recipe

from diffusers_align.data import load_preferences, load_prompts
from diffusers_align.embedded import edits
from diffusers_align.rewards import BUILT_INS
from diffusers_align.rewards.registry import parse_terms
from diffusers_align.training.flags.old_names import warn

RECIPES = sorted((SCRIPTS / "recipes").glob("*.yaml"))


def script_of(recipe: Path):
    """The script whose algorithm's name the recipe's begins with."""
    stems = [path.stem for path in SCRIPTS.glob("train_*.py") if recipe.stem.startswith(path.stem.removeprefix("train_"))]
    assert stems, f"{recipe.name} begins with no script's name"
    return load_script(max(stems, key=len))


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


@pytest.mark.parametrize("text", ["0123456", "1.50", "12:34:56", "0010", "0b11", "1e3", "2026-01-01", "1_000"])
def test_a_text_is_what_is_written(tmp_path, text):
    """YAML 1.1 reads a commit of digits as an octal number, a time as seconds in base 60, a date as a date."""
    args = parse(*recipe(tmp_path, f"revision: {text}\nreport_to: tensorboard\nrun_name: {text}\nprompt_column: '{text}'\nlora_layers: [{text}, to_q]\n"))
    assert (args.revision, args.run_name, args.prompt_column, args.lora_layers) == (text, text, text, f"{text},to_q")


def test_a_word_that_yaml_reads_as_a_truth_value_is_a_choice_or_needs_quotes(tmp_path, capsys):
    for word in ("no", "false", "off"):
        assert parse(*recipe(tmp_path, f"mixed_precision: {word}\n")).mixed_precision == "no"
    said = message(capsys, *recipe(tmp_path, "eval_prompts: no\n"))
    assert "--eval_prompts must be text that is not empty, in quotes where it is a word that YAML reads" in said
    assert parse(*recipe(tmp_path, "eval_prompts: 'no'\n")).eval_prompts == "no"


def test_a_truth_value_in_quotes_is_told_from_one_without(tmp_path, capsys):
    assert "--use_ema must be true or false, without quotes, got false" in message(capsys, *recipe(tmp_path, "use_ema: 'false'\n"))


def test_home_is_where_the_shell_has_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "p.txt").write_text("a fox\n")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "p", "image": "x.png"}\n')
    args = parse(*recipe(tmp_path, "output_dir: ~/runs\nprompts: ~/p.txt\n"), "--reward=~/r.py:f", required=["--pretrained_model_name_or_path", "~/model"])
    assert [args.output_dir, args.prompts] == [f"{tmp_path}/runs", f"{tmp_path}/p.txt"]
    assert [args.reward, args.pretrained_model_name_or_path] == [f"{tmp_path}/r.py:f", f"{tmp_path}/model"]
    assert [prompt.text for prompt in load_prompts("~/p.txt")] == ["a fox"]
    with pytest.raises(ValueError, match=f"image: no file {tmp_path}/x.png"):
        load_preferences("~/pairs.jsonl", "captioned")
    with pytest.raises(ValueError, match="No file or folder '~/none'"):
        load_preferences("~/none", "captioned")


def test_a_list_is_a_comma_separated_value(tmp_path):
    assert parse(*recipe(tmp_path, "lora_layers: [to_q, to_k]\n")).lora_layers == "to_q,to_k"


def test_what_a_recipe_says_of_a_value_goes_with_it(tmp_path, capsys):
    config = recipe(tmp_path, "reward: clip_score\nreward_model: mini-clip\neval_reward: clip_score\neval_reward_model: mini-clip\n")
    needed = [*config, "--pretrained_model_name_or_path", "mini-sd3", "--prompts", "mini_train", "--output_dir", "out"]
    models = []
    for words in ([], ["--reward", "clip_score"], ["--reward", "pick_score"], ["--reward", "pick_score", "--reward_model", "mine"]):
        args = load_script("train_draft").parse_args([*needed, *words])
        models.append((args.reward_model, args.eval_reward_model))
    assert models == [("mini-clip", "mini-clip")] * 2 + [(None, "mini-clip"), ("mine", "mini-clip")]
    said = capsys.readouterr().err
    assert (
        said.count("left out") == 1
        and "--reward_model mini-clip" in said
        and "is for the recipe's --reward clip_score, so it is left out with pick_score" in said
    )


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
def test_shipped_recipes_parse_with_their_script(path, capsys, tmp_path, monkeypatch):
    warn.cache_clear()
    if "edits/" in path.read_text():  # the data that a command writes
        edits.write(tmp_path / "edits", {"train": 1, "heldout": 1})
        monkeypatch.chdir(tmp_path)
    args = script_of(path).parse_args(["--config", str(path)])
    assert "the old name" not in capsys.readouterr().err, "recipes of the package say flags as they are called today"
    offline = getattr(args, "dataset_name", None)  # such scripts need neither reward nor prompts
    assert (offline and args.reward is None) or all(name in BUILT_INS for name, _ in parse_terms(args.reward))
    prompts = [args.prompts, getattr(args, "eval_prompts", None)]
    assert all(load_prompts(source) for source in prompts if source)
    assert offline or args.prompts, "what it trains on"
    assert not Path(args.output_dir).is_absolute()
    assert isinstance(args.learning_rate, float)
    assert isinstance(getattr(args, "clip_range", 0.0), float)


def test_there_are_recipes_for_every_script():
    assert {script_of(path).__name__ for path in RECIPES} == set(ALIGNING)


# the output folder


def test_a_folder_is_no_recipe(tmp_path, capsys):
    assert f"no recipe '{tmp_path}': it is a folder. Name a YAML file in it" in message(capsys, "--config", str(tmp_path))
