"""The command line of the package."""

import re
from pathlib import Path

import pytest

from diffusers_align import __version__
from diffusers_align.__main__ import main
from diffusers_align.files.paths import front_door, names

ROOT = Path(__file__).parents[1]


def test_the_command_line_lists_and_finds(capsys):
    main(["list"])
    printed = capsys.readouterr().out
    assert "train_ddpo" in printed and "flow_grpo_fast" in printed
    main(["path", "train_flow_grpo"])
    assert Path(capsys.readouterr().out.strip()) == front_door("training_scripts", "train_flow_grpo")
    assert "recipes" not in printed.split("training_scripts: ")[1].splitlines()[0]
    main(["list", "recipes"])
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert list(lines) == ["recipes, verified", "recipes, runs", "recipes, parsed"] and "ddpo_sd15" in lines["recipes, parsed"]
    assert sorted(name for line in lines.values() for name in line.split(", ") if name != "none") == names("recipes")
    for name in ("ddpo_mini_sd", "ddpo_mini_sd.yaml"):
        main(["path", name])
        assert Path(capsys.readouterr().out.strip()) == ROOT / "training_scripts" / "recipes" / "ddpo_mini_sd.yaml"
    main(["path", "recipes"])
    assert Path(capsys.readouterr().out.strip()) == ROOT / "training_scripts" / "recipes"
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"diffusers-align {__version__}\n"
    for name, message in (("nothing", "diffusers-align list"), ("train_ddpoo", "did you mean .*train_ddpo")):
        with pytest.raises(SystemExit):
            main(["path", name])
        assert re.search(message, capsys.readouterr().err)
