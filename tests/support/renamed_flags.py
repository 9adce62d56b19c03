"""Flags of which some have old names."""

from diffusers_align.training.flags.old_names import warn
from diffusers_align.training.flags.options import Arguments, option, parse


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


def said_by(arguments, argv, capsys):
    warn.cache_clear()
    try:
        args, status = parse(arguments, argv, "A script."), 0
    except SystemExit as exit:
        args, status = None, exit.code
    return args, status, capsys.readouterr()
