"""Imported once by the server of worker processes."""

from .worker import preload

preload()
