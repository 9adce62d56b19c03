"""Every flag of ours that the written pages name is one of the script that they name it for. Whole commands: `test_code_blocks.py`."""

import functools
import re

import pytest
from code_blocks import ROOT, is_flags_of, loaded

from diffusers_align.training.flags.options import options_of

DOCS, SCRIPTS = ROOT / "docs", ROOT / "training_scripts"
PAGES = sorted([*(DOCS / "guides").glob("*.md"), *(DOCS / f"{name}.md" for name in ("which_method", "metrics", "troubleshooting"))])
FLAG = re.compile(r"(?<![\w-])--(no-)?([a-z]\w*)")
SCRIPT = re.compile(r"\b(train_\w+|make_preferences|evaluate)\.py\b")
GENERAL = {"troubleshooting", "a_pipeline_that_fails"}  # pages about every script
BENCHMARK = re.compile(r"`(python benchmarks/[^`]+|--(task|minutes)[^`]*)`")
# Of accelerate and of the reward server, which stand in the same command lines.
OTHERS = {"config_file", "num_processes", "machine_rank", "main_process_ip", "host", "port"}


@functools.cache
def flags_of(script):
    """The flags of a script, which its last class declares or inherits."""
    module = loaded(SCRIPTS / f"{script}.py")
    return frozenset(options_of([value for value in vars(module).values() if is_flags_of(value, module)][-1]))


def scripts_in(text):
    """The scripts that a text names and that there are."""
    named = dict.fromkeys(SCRIPT.findall(text))
    assert not (lost := [name for name in named if not (SCRIPTS / f"{name}.py").is_file()]), f"no such script: {lost}"
    return list(named)


def flags_in(text):
    return {name for _, name in FLAG.findall(text)} - OTHERS


def sections():
    text = (DOCS / "migration.md").read_text(encoding="utf-8")
    return [(part.split("\n")[0], part) for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]]


def rows(section):
    """The cells of a section's table, without its head."""
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    for line in lines[1:]:
        yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


@pytest.mark.parametrize("heading, section", sections(), ids=lambda value: value.split(" ")[0] if "\n" not in value else "")
def test_each_flag_of_a_migration_table_is_one_of_its_script(heading, section):
    (script,) = scripts_in(heading)
    known, number = flags_of(script), 0
    for theirs, ours, *remark in rows(section):
        own = theirs if ours == "the same names" or ours == "the same" else ours
        unknown = flags_in(" ".join([own, *remark])) - known - {flag for other in scripts_in(" ".join(remark)) for flag in flags_of(other)}
        assert not unknown, f"{heading}: {script}.py has no {sorted(unknown)} (in the row of {theirs})"
        number += bool(flags_in(own))
        assert ours == "–" or flags_in(own) or "metric" in theirs, f"{heading}: what is the row of {theirs} about?"
    assert number > 8


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_each_flag_of_a_page_is_one_of_some_script_that_it_names(page):
    text = page.read_text(encoding="utf-8")
    named = [path.stem for path in SCRIPTS.glob("*.py")] if page.stem in GENERAL else scripts_in(text)
    if "diffusers-align plan" in text:  # which takes the flags of every script, and its own
        named, text = [path.stem for path in SCRIPTS.glob("*.py")], re.sub(r"--(gpu|script|config)\b|hf download[^`\n]*", "", text)
    unknown = flags_in(BENCHMARK.sub("", text)) - {flag for script in named for flag in flags_of(script)}
    assert not unknown, f"{page.name} names {sorted(unknown)}, which none of {named} has"
