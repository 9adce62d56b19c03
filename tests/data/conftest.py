"""Fixtures that several files of this folder take."""

from preference_rows import folder  # noqa: F401
