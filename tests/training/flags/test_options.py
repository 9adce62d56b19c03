"""How fields become flags: their old names, and the two screens of help."""

import re

import pytest

from diffusers_align.training.flags.old_names import warn
from diffusers_align.training.flags.options import Arguments, old_names_of, option, options_of, parse


class Renamed(Arguments, gone={"random_timesteps": bool}):
    """small"""

    kl_weight: float = option(0.0, "of the KL", was=("kl_beta", "beta_kl"))
    clip: bool = option(True, "the ratio", was="clip_ratio")
    window: tuple[int, int] | None = option(None, "steps", was="window_range")
    timestep_fraction: float = option(0.99, "first share", advanced=True)
    random_timestep_fraction: float | None = option(None, "random share")

    @classmethod
    def from_old(cls, given):
        if given.pop("random_timesteps", False):
            given.setdefault("random_timestep_fraction", given.pop("timestep_fraction", 0.99))
        return given


class Inherited(Renamed, advanced={"clip"}, basic={"timestep_fraction"}, was={"clip": "cut"}, resume={"clip": "free"}):
    """smaller"""


def said_by(arguments, argv, capsys):
    warn.cache_clear()
    try:
        args, status = parse(arguments, argv, "A script."), 0
    except SystemExit as exit:
        args, status = None, exit.code
    return args, status, capsys.readouterr()


@pytest.mark.parametrize("old", ["kl_beta", "beta_kl"])
def test_an_old_name_is_taken_with_a_warning(tmp_path, capsys, old):
    args, _, said = said_by(Renamed, [f"--{old}", "0.5", "--no-clip_ratio", "--window_range", "1", "2"], capsys)
    assert (args.kl_weight, args.clip, args.window) == (0.5, False, (1, 2)) and args.given("kl_weight")
    assert said.err.splitlines()[0] == f"--{old} is now called --kl_weight; the old name goes with the next version." and len(said.err.splitlines()) == 3
    assert args.command.endswith("--kl_weight 0.5 --no-clip --window 1 2")
    recipe = tmp_path / "old.yaml"
    recipe.write_text(f"{old}: 0.25\n")
    args, _, said = said_by(Renamed, [f"--config={recipe}"], capsys)
    assert args.kl_weight == 0.25 and f"{old} (in {recipe}, line 1) is now called kl_weight;" in said.err
    assert said_by(Renamed, [f"--config={recipe}", "--kl_weight=1"], capsys)[0].kl_weight == 1.0, "the command line over the recipe"


@pytest.mark.parametrize("argv", [["--kl_beta=1", "--kl_weight=1"], ["--kl_beta=1", "--beta_kl=1"], ["--clip", "--no-clip_ratio"]])
def test_a_flag_under_both_names_is_refused(tmp_path, capsys, argv):
    args, status, said = said_by(Renamed, argv, capsys)
    assert (args, status) == (None, 2) and "give it once" in said.err
    recipe = tmp_path / "both.yaml"
    recipe.write_text("kl_beta: 1\nkl_weight: 1\n")
    assert said_by(Renamed, [f"--config={recipe}"], capsys)[1] == 2


def test_a_flag_whose_meaning_changed_is_converted(tmp_path, capsys):
    args, _, said = said_by(Renamed, ["--random_timesteps", "--timestep_fraction", "0.5"], capsys)
    assert (args.timestep_fraction, args.random_timestep_fraction) == (0.99, 0.5)
    assert "--random_timesteps (on the command line) is no flag any more and is read as --random_timestep_fraction 0.5;" in said.err
    recipe = tmp_path / "old.yaml"
    recipe.write_text("random_timesteps: true\ntimestep_fraction: 0.6\n")
    assert said_by(Renamed, [f"--config={recipe}"], capsys)[0].random_timestep_fraction == 0.6
    assert said_by(Renamed, ["--no-random_timesteps", "--timestep_fraction=0.4"], capsys)[0].timestep_fraction == 0.4


def test_flags_of_an_old_checkpoint_are_read_under_the_new_names():
    kept = old_names_of(Renamed).kept({"kl_beta": 0.5, "random_timesteps": True, "timestep_fraction": 0.6, "other": 1})
    assert kept == {"kl_weight": 0.5, "random_timestep_fraction": 0.6, "other": 1}


def test_a_name_is_not_a_flag_and_an_old_one(capsys):
    class Both(Renamed, was={"kl_weight": "clip"}):
        """both"""

    with pytest.raises(TypeError, match="--clip is a flag and the old name of one"):
        parse(Both, [])
    with pytest.raises(TypeError, match="unknown class keyword advance"):
        type("Wrong", (Renamed,), {}, advance={})


def test_the_first_screen_names_advanced_flags_and_the_second_explains_them(capsys):
    first, second = (said_by(Inherited, [word], capsys)[2].out for word in ("--help", "--help_all"))
    assert "--kl_weight X" in first and "advanced (--help_all explains them):\n  small: --clip\n" in first and "--timestep_fraction X" in first
    assert "the ratio" not in first and "the ratio" in second and "advanced (" not in second
    assert not {"kl_beta", "random_timesteps", "clip_ratio", "cut"} & {*re.findall(r"\w+", first + second)}
    assert options_of(Inherited)["clip"].resume == "free" and not options_of(Renamed)["clip"].advanced
    assert said_by(Inherited, ["--no-cut"], capsys)[0].clip is False


@pytest.mark.parametrize("typo", ["--kl_bet=1", "--kl_weigth=1"])
def test_a_typo_is_answered_with_the_new_name(capsys, typo):
    assert "(did you mean --kl_weight?)" in said_by(Renamed, [typo], capsys)[2].err
