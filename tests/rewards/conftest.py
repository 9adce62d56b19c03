"""Fixtures that several files of this folder take."""

from reward_models import aesthetic_checkpoint, clip_folder  # noqa: F401
