"""Tests. A package, so that `python -m tests.families` runs from the root."""
