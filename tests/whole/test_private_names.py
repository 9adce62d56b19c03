"""What other modules use is public, with a contract."""

import ast

import pytest
from private_names import CODE, EVERYWHERE, PUBLIC, UPSTREAM, private_names_read


def test_private_names_are_found():
    source = ast.parse("from x import _a\nclass C:\n    def _b(self): self._b(); self._c; x._b(); x._d; x.__e__\ngetattr(x, '_f')")
    assert private_names_read(source, EVERYWHERE) == {"_a", "_c", "_d", "_f"}


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.stem)
def test_no_module_reads_what_is_private_to_another(path):
    """Of other libraries only what UPSTREAM lists, and docs/patches.md explains."""
    assert private_names_read(ast.parse(path.read_text()), EVERYWHERE) - set(UPSTREAM) - PUBLIC == set()


def test_every_private_name_that_is_listed_is_read():
    read = {name for path in CODE for name in private_names_read(ast.parse(path.read_text()), EVERYWHERE)}
    assert set(UPSTREAM) | PUBLIC <= read
