"""docs/foundations.md: each formula's function is there, and so is the test that checks it."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROWS = [line.split("|") for line in re.sub(r"\\\|", "", (ROOT / "docs" / "foundations.md").read_text(encoding="utf-8")).splitlines() if "::test_" in line]


def test_there_are_rows():
    assert len(ROWS) > 30 and all(len(row) == 6 for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[1].strip())
def test_a_formula_has_its_function_and_its_test(row):
    assert row[2].count("$") % 2 == 0
    for name in re.findall(r"`([\w.]+)`", row[3]):
        module, _, attribute = name.rpartition(".")
        module, attributes = (module, [attribute]) if not module.rpartition(".")[2][:1].isupper() else (module.rpartition(".")[0], name.split(".")[-2:])
        found = importlib.import_module(f"diffusers_align.{module}")
        for part in attributes:
            found = getattr(found, part)
    path, _, function = row[4].strip(" `").partition("::")
    assert re.search(rf"^def {function}\(", (ROOT / "tests" / path).read_text(encoding="utf-8"), re.MULTILINE), f"{path} has no {function}"
