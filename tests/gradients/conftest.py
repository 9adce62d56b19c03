"""Fixtures that several files of this folder take."""

from differentiated import sd3  # noqa: F401
