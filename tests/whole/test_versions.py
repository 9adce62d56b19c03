"""The oldest versions that pyproject.toml allows are those that `make versions-oldest` installs and tests."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Its oldest release has no small build on every index: `make versions-oldest TORCH=torch==2.5.0`.
GIVEN_BY_MAKE = {"torch"}


def lowest() -> dict[str, str]:
    """The lower bound of each requirement of the package."""
    block = re.search(r"^dependencies = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)[1]
    return dict(re.fullmatch(r'\s*"([\w-]+)>=([\d.]+)",', line).groups() for line in block.splitlines())


def pinned() -> dict[str, str]:
    lines = (ROOT / "tests/families/oldest.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def padded(version: str) -> tuple[int, ...]:
    numbers = [int(number) for number in version.split(".")]
    return (*numbers, *[0] * (3 - len(numbers)))


def test_what_is_tested_is_the_lowest_that_is_allowed():
    bounds, pins = lowest(), pinned()
    assert set(pins) == set(bounds) - GIVEN_BY_MAKE and GIVEN_BY_MAKE < set(bounds)
    assert {name: padded(version) for name, version in pins.items()} == {name: padded(bounds[name]) for name in pins}


def test_the_pages_name_those_versions():
    bounds = lowest()
    said = (ROOT / "docs/install.md").read_text()
    for name in ("torch", "diffusers", "transformers", "peft"):
        assert f"{name} {bounds[name]} or later" in said
