"""What the written pages quote is there: messages in the code, figures in benchmarks/README.md or docs/frontier.md."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
FIGURES = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in ("benchmarks/README.md", "docs/frontier.md"))
# A mean with its error, or a share with its interval, both as the benchmarks write them.
FIGURE = re.compile(r"[+-]?\d+\.\d+ ± \d+\.\d+")


def told():
    """All texts that the package and the scripts may print, what is filled in as `*`."""
    for path in [*(ROOT / "diffusers_align").rglob("*.py"), *(ROOT / "training_scripts").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "*" for part in node.values)


def quoted(page):
    """The texts in backquotes at the beginning of a table's rows that are sentences, or parts of one."""
    for line in (DOCS / page).read_text(encoding="utf-8").splitlines():
        if line.startswith("| "):
            yield from (text for text in re.findall(r"`([^`]+)`", line.split(" | ")[0]) if " " in text and not text.startswith("--"))


@pytest.mark.parametrize("page", ["troubleshooting.md", "guides/a_pipeline_that_fails.md", "guides/editing.md", "guides/several_gpus.md", "guides/video.md"])
def test_quoted_messages_are_the_codes_own(page):
    texts, quotes = "\n".join(told()), list(quoted(page))
    assert quotes
    patterns = {quote: [re.escape(part.strip()) for part in re.split(r"\.\.\.|\b[NM]\b", quote) if part.strip()] for quote in quotes}
    invented = [quote for quote, parts in patterns.items() if not re.search(r"[^\n]*?".join(parts), texts)]
    assert not invented, f"{page} quotes what nothing says: {invented}"


@pytest.mark.parametrize("page", ["which_method.md", "guides"])
def test_figures_are_those_of_the_benchmarks(page):
    texts = [path.read_text(encoding="utf-8") for path in ([DOCS / page] if page.endswith(".md") else (DOCS / page).glob("*.md"))]
    found = [figure for text in texts for figure in FIGURE.findall(text)]
    assert len(found) > 5
    strange = [figure for figure in found if figure.lstrip("+-") not in FIGURES]
    assert not strange, f"neither benchmarks/README.md nor docs/frontier.md has {strange}"
