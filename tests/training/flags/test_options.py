"""How fields become flags: their old names, and the two screens of help."""

import re

from renamed_flags import Renamed, said_by

from diffusers_align.training.flags.options import options_of


class Inherited(Renamed, advanced={"clip"}, basic={"timestep_fraction"}, was={"clip": "cut"}, resume={"clip": "free"}):
    """smaller"""


def test_the_first_screen_names_advanced_flags_and_the_second_explains_them(capsys):
    first, second = (said_by(Inherited, [word], capsys)[2].out for word in ("--help", "--help_all"))
    assert "--kl_weight X" in first and "advanced (--help_all explains them):\n  small: --clip\n" in first and "--timestep_fraction X" in first
    assert "the ratio" not in first and "the ratio" in second and "advanced (" not in second
    assert not {"kl_beta", "random_timesteps", "clip_ratio", "cut"} & {*re.findall(r"\w+", first + second)}
    assert options_of(Inherited)["clip"].resume == "free" and not options_of(Renamed)["clip"].advanced
    assert said_by(Inherited, ["--no-cut"], capsys)[0].clip is False
