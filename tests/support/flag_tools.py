"""Flags of a small script, parsed."""

import importlib.util
from pathlib import Path

import pytest

from diffusers_align.files.paths import folder
from diffusers_align.training.flags import common, options
from diffusers_align.training.flags.options import StepIndex, option

SCRIPTS = folder("training_scripts")


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


def load_script(stem: str):
    spec = importlib.util.spec_from_file_location(stem, SCRIPTS / f"{stem}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# recipes


# train_reward.py makes a reward rather than aligning a model with one: it has flags of its own.
ALIGNING = sorted(path.stem for path in SCRIPTS.glob("train_*.py") if path.stem != "train_reward")
