"""Fixtures that several files of this folder take."""

from wrapping import pipes  # noqa: F401
