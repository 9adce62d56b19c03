"""Old names of flags: taken with a warning, converted, refused beside the new one."""

import pytest
from renamed_flags import Renamed, said_by

from diffusers_align.training.flags.options import old_names_of, parse


@pytest.mark.parametrize("old", ["kl_beta", "beta_kl"])
def test_an_old_name_is_taken_with_a_warning(tmp_path, capsys, old):
    args, _, said = said_by(Renamed, [f"--{old}", "0.5", "--no-clip_ratio", "--window_range", "1", "2"], capsys)
    assert (args.kl_weight, args.clip, args.window) == (0.5, False, (1, 2)) and args.given("kl_weight")
    assert said.err.splitlines()[0] == f"--{old} is now called --kl_weight; the old name goes with version 0.2.0." and len(said.err.splitlines()) == 3
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


@pytest.mark.parametrize("typo", ["--kl_bet=1", "--kl_weigth=1"])
def test_a_typo_is_answered_with_the_new_name(capsys, typo):
    assert "(did you mean --kl_weight?)" in said_by(Renamed, [typo], capsys)[2].err
